"""Evaluation on long prompts with known answers, which are made without a download."""
