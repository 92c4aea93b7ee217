"""What evaluation, calibration and benchmarks share: prompts with answers, timed generation, records of a run."""
