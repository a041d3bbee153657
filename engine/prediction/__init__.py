"""A model of a CUDA GPU: its allocator, its kernels' memory, its names."""
