"""Tools of evaluation, calibration and benchmarks: prompts with answers, timed generation, records of a run."""
