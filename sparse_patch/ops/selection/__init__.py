"""Ops that score keys. Methods make their plans from these scores."""
