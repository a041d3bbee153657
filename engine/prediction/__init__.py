"""What a CUDA GPU would do, modelled: its allocator, its kernels' memory, its names."""
