"""Why memory ran out: the verdict from what was free where, and what rises with every step."""

from __future__ import annotations

from typing import Any

import pytest

from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.out_of_memory.growth import LiveBytes, Rise
from gpumem_tui.engine.out_of_memory.refusal import Refused
from gpumem_tui.engine.out_of_memory.report import Pool, Verdict
from gpumem_tui.engine.out_of_memory.verdict import Circumstances, judge

from .allocator_state import pool

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def refused(asked: int, free: int = 0, pools: tuple[Pool, ...] = (), **known: Any) -> Refused:
    return Refused(
        asked_bytes=asked, needed_bytes=max(asked, 2 * MIB), reserved_bytes=0, free_bytes=free, pools=pools, **known
    )


CARD = Circumstances(total_bytes=24 * GIB, outside_bytes=GIB, step=2)
STATE = {Category.OPTIMIZER_STATE: 8 * GIB}
LEAK = Rise(GIB, 6)


@pytest.mark.parametrize(
    ("verdict", "of", "around"),
    [
        (Verdict.TOO_BIG, refused(24 * GIB, free=20 * GIB), CARD),
        (Verdict.TOO_BIG, refused(10 * GIB, limit_bytes=8 * GIB), CARD),
        (Verdict.FULL, refused(2 * GIB, GIB), CARD),
        (Verdict.FULL, refused(2 * GIB, GIB, (pool(GIB // 2, GIB // 4),)), CARD),
        (Verdict.FRAGMENTED, refused(2 * GIB, GIB, (pool(4 * GIB, GIB),)), CARD),
        (Verdict.STRANDED, refused(2 * GIB, GIB, (pool(3 * GIB, 3 * GIB, stream=7),)), CARD),
        (Verdict.STRANDED, refused(2 * GIB, 0, (pool(3 * GIB, 3 * GIB, name="large (0, 1)"),)), CARD),
        (Verdict.STRANDED, refused(2 * GIB, GIB, (pool(GIB // 2, MIB), pool(GIB, GIB, stream=7))), CARD),
        (Verdict.FULL, refused(KIB, 0, (pool(3 * GIB, 3 * GIB),)), CARD),
        (Verdict.SOMEBODY_ELSES, refused(2 * GIB), CARD._replace(outside_bytes=8 * GIB, others_bytes=7 * GIB)),
        (Verdict.SOMEBODY_ELSES, refused(2 * GIB), CARD._replace(outside_bytes=8 * GIB)),
        (Verdict.FULL, refused(2 * GIB), CARD._replace(outside_bytes=3 * GIB)),
        (Verdict.FULL, refused(2 * GIB), CARD._replace(outside_bytes=8 * GIB, others_bytes=GIB)),
        (Verdict.GROWN, refused(2 * GIB), CARD._replace(rise=LEAK, grows="held by script", came=STATE)),
        (Verdict.MOVED, refused(2 * GIB), CARD._replace(rise=Rise(KIB, 6), came=STATE)),
        (Verdict.FULL, refused(9 * GIB), CARD._replace(rise=LEAK, came=STATE)),
        (Verdict.GROWN, refused(2 * GIB, GIB, (pool(4 * GIB, GIB),)), CARD._replace(rise=LEAK)),
        (Verdict.MOVED, refused(2 * GIB, GIB, (pool(4 * GIB, GIB),)), CARD._replace(came=STATE)),
        (Verdict.FULL, refused(2 * MIB), CARD._replace(others_bytes=489 * MIB)),
    ],
)
def test_the_verdict_follows_from_what_is_free_where(verdict: Verdict, of: Refused, around: Circumstances) -> None:
    found, reason = judge(of, around)
    assert (found, "\n" in reason) == (verdict, False), reason


def test_the_reason_names_bytes_and_culprits() -> None:
    _, moved = judge(refused(2 * GIB), CARD._replace(came=STATE))
    assert moved.startswith("step 1 fitted; new since then, and there to stay: optimizer (8.00 GiB); ")
    assert (Verdict.MOVED.value, Verdict.MOVED.words) == ("moved", "came later")
    _, grown = judge(refused(2 * GIB), CARD._replace(rise=LEAK, grows="held by script"))
    assert "with every step 1.00 GiB more stay alive (held by script)" in grown
    _, stranded = judge(refused(2 * GIB, GIB, (pool(3 * GIB, 3 * GIB, stream=7),)), CARD)
    assert "3.00 GiB of them in one piece for stream 0x7" in stranded


def test_what_is_free_on_the_device_is_held_against_the_segment_that_torch_takes() -> None:
    """12 MiB are more than the 8 MiB asked for, and no segment of 20 MiB fits in them."""

    def reason(cached: int) -> tuple[Verdict, str]:
        refused = Refused(8 * MIB, 20 * MIB, 108 * MIB, 12 * MIB, limit_bytes=120 * MIB, pools=(pool(cached, 6 * MIB),))
        return judge(refused, CARD)

    assert reason(10 * MIB) == (
        Verdict.FRAGMENTED,
        "10.0 MiB are cached and 12.0 MiB of the device are free, together enough for the segment of 20.0 MiB that "
        "torch takes for 8.0 MiB, but the largest cached piece is 6.0 MiB",
    )
    small = Pool(stream=0, pool="small", cached_bytes=3 * MIB, largest_free_block_bytes=MIB)
    pools = (pool(10 * MIB, 6 * MIB), small)
    both = Refused(8 * MIB, 20 * MIB, 108 * MIB, 12 * MIB, limit_bytes=120 * MIB, pools=pools)
    assert judge(both, CARD)[1].startswith("10.0 MiB are cached in the large pool and 12.0 MiB of the device are free")
    verdict, full = reason(7 * MIB)
    assert verdict is Verdict.FULL and full.endswith(
        "free, less than the segment of 20.0 MiB that torch takes for 8.0 MiB"
    )


# --- growth --------------------------------------------------------------------------------


def live_bytes(figures: list[int]) -> LiveBytes:
    live = LiveBytes()
    for figure in figures:
        live.add(figure)
    return live


def test_what_rises_by_about_the_same_with_every_step_is_a_leak() -> None:
    assert live_bytes([50, 70, *range(70, 190, 20)]).rise() == Rise(20, 5)
    assert live_bytes([100, 110, 120]).rise() is None, "too early to tell"
    assert live_bytes([100, 110, 120]).rise(at_least=3) == Rise(10, 2), "not where memory has run out"
    assert live_bytes([100] * 9).rise(at_least=3) is None
    assert live_bytes([10, 20, 30, 40, 400, 410]).rise() is None, "something has come; it does not grow"


def test_a_leak_is_seen_beneath_rows_of_different_lengths() -> None:
    noise = [(step * 3) % 4 * 1000 for step in range(80)]
    rise = live_bytes([1_000_000 + 100 * step + noise[step] for step in range(80)]).rise()
    assert rise is not None
    assert rise.bytes == pytest.approx(100, rel=0.5)
    assert live_bytes([1_000_000 + n for n in noise]).rise() is None
