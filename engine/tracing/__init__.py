"""Where the stream of allocations comes from."""
