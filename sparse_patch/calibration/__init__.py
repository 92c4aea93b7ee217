"""Offline searches that write the artefacts (files) that methods read."""
