"""Jobs of several ranks: what is told of each, and what is predicted of them."""

from __future__ import annotations

import msgspec

from gpumem_tui.engine import techniques
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.known import predicted
from gpumem_tui.engine.report import of_job
from gpumem_tui.profiles import run_fields

H100 = gpu("H100 80GB")


def test_a_jobs_document_is_that_of_its_highest_rank_with_a_line_for_each() -> None:
    low = predicted(techniques.configure(run_fields("tiny"), {"batch_size": 1}), H100).document
    high = predicted(techniques.configure(run_fields("tiny"), {"batch_size": 2}), H100).document
    job = of_job({1: high, 0: low, 2: high}, {1: 5 << 20})
    assert msgspec.structs.replace(job, ranks=[]) == high
    assert [one.rank for one in job.ranks] == [0, 1, 2]
    assert job.ranks[0].loaded == low.loaded
    assert job.peak is not None and job.ranks[1].peak is not None and job.ranks[0].peak is not None
    assert job.ranks[1].peak.by_category == job.peak.by_category
    assert job.ranks[0].peak.allocated_bytes < job.peak.allocated_bytes
    assert [one.outside_torch_bytes for one in job.ranks] == [None, 5 << 20, None]
