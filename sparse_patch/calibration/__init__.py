"""Offline searches that write the files which methods read."""
