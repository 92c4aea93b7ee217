"""Checkpoints: how any is loaded, and those with a loader of their own."""
