"""The explanations that `?` gives of the parts of the live screen; with a category's meaning at most 60 words."""

from __future__ import annotations

OTHERS = "all others"

PARTS = {
    "run": (
        "The last step: its wall time, the wait for the GPU and the loss included (on screen 2 stands the host's: from "
        "its first phase to its last, while the GPU may lag behind), tokens a second, loss; the share of all time "
        "that tracing has taken."
    ),
    "device": (
        "The whole device on one axis from 0 to its capacity. Letters: this run by category; then what the allocator "
        "keeps cached, the CUDA context, other processes; dots are free. Usable is the most that one request can have: "
        "how far the edge is. Gaps between blocks in use are out of its reach; above 1 % they show."
    ),
    "why": (
        "Where the peak is, and what it is the sum of: what was there when the step began and still is, and what has "
        "come on top. In brackets the row above less what was there before. Below: of all changes of one technique, "
        "with the same batch in all, the one predicted to lower it most."
    ),
    OTHERS: (
        "Buffers, inputs, workspace and slack together, as a rule the smallest; the largest of them are named behind. "
        "In a taller window each has a row of its own."
    ),
    "recompute": (
        "A mark for every layer. With checkpointing, backward computes each layer's activations again: its mark "
        "lights up as that happens, with the bytes made and the time it took. The row R recomputed is what of them is "
        "alive: a layer's go as soon as backward has used them."
    ),
}
"""Parts of this screen that are no category, and what `?` says of them."""
