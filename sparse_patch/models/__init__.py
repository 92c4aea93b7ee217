"""Checkpoints: loading in general, and the models that have their own loader."""
