"""Out of memory: what was asked, what was there, why it did not fit, and the smallest change that would have."""
