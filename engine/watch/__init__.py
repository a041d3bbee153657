"""Watching a training loop that is not ours, from inside its own process."""
