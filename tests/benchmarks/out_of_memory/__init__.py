"""Out of memory, induced in many ways: is the report there, is it exact, is it right, and does its fix fit?

    python -m tests.benchmarks.out_of_memory [--json FILE] [--quick] [--without-fixes] [--only TEXT]

Runs of our own under a memory limit that is aimed at a moment of theirs, and
watched scripts that leak, fragment, strand and ask for too much. On a GPU
gpt2 and qwen2.5-0.5b; without one the share that can run there, on tiny.

Columns: the verdict, as constructed or not; seconds from the refusal to the
report; whether the categories sum to the allocator's count, with 0 unknown;
bytes leaked afterwards; the first fix, whether a run with it fits, and whether
one with the next smaller change does not.
"""
