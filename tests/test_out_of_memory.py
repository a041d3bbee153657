"""Out of memory: what was asked, what was there, and why it did not fit."""

from __future__ import annotations

import json

import msgspec

from gpumem_tui.engine.out_of_memory.report import Fix, LargestTensor, OutOfMemoryReport, Pool, Verdict
from gpumem_tui.engine.run_events import OutOfMemory, from_plain, to_plain


def a_report(**known: object) -> OutOfMemoryReport:
    figures: dict[str, object] = {
        "asked_bytes": 512 << 20, "verdict": Verdict.FULL, "reason": "all is taken", "phase": "backward", "step": 2,
        "allocated_bytes": 3 << 30, "by_category": {"parameters": 1 << 30, "activations": 2 << 30},
        "total_bytes": 4 << 30,
    }  # fmt: skip
    return OutOfMemoryReport(**figures | known)  # type: ignore[arg-type]


def test_a_report_travels_as_json_and_comes_back_the_same() -> None:
    report = a_report(
        largest=(LargestTensor(bytes=1 << 30, category="parameters", owner="lm_head.weight"),),
        pools=(Pool(stream=0, pool="large", cached_bytes=5, largest_free_block_bytes=3),),
        fixes=(Fix(set={"batch_size": 4, "checkpointing": "layers"}, peak_bytes=9, fits=True, keeps_mathematics=True),),
        shape=(8192, 16384), dtype="bfloat16", operator="aten.mm",
    )  # fmt: skip
    event = OutOfMemory(text="out of memory", step=2, phase="backward", report=report)
    assert from_plain(json.loads(msgspec.json.encode(to_plain([event])))) == [event]


def test_a_recording_from_before_there_were_reports_opens() -> None:
    old = {"kind": "out_of_memory", "text": "CUDA out of memory", "step": 3, "phase": "forward", "requested_bytes": 7}
    assert from_plain([old]) == [OutOfMemory(text="CUDA out of memory", step=3, phase="forward", requested_bytes=7)]
