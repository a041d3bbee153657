#!/usr/bin/env bash
# Everything that only a GPU can prove, in one go; a short table at the end of each part.
set -uo pipefail
cd "$(dirname "$0")/../.."
failed=0
python3 -m pytest -m gpu -n 0 -q -p no:cacheprovider "$@" || failed=1
python3 -m tests.benchmarks.exactness || failed=1
python3 -m gpumem_tui.tui sweep --preset reference --format md || failed=1
python3 -m tests.benchmarks.cost || failed=1
python3 -m tests.benchmarks.watched || failed=1
python3 -m tests.benchmarks.restart || failed=1
python3 -m tests.benchmarks.attached --profile polyglot-ko-1.3b --set batch_size=8 || failed=1
python3 -m tests.benchmarks.prediction || failed=1
python3 -m tests.benchmarks.other_models || failed=1
python3 -m tests.benchmarks.out_of_memory || failed=1
python3 -m tests.benchmarks.techniques_matrix || failed=1
python3 -m tests.benchmarks.recurrent || failed=1
if [ "$(python3 -c 'import torch; print(torch.cuda.device_count())')" -ge 2 ]; then
  python3 -m tests.benchmarks.ranks || failed=1
fi
exit $failed
