"""The sources of the stream of allocations."""
