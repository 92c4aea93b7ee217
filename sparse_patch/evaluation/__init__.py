"""Evaluation: long prompts with known answers, made without a download."""
