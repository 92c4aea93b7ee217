"""Run every causal class of Transformers with every method, on tiny random models, and write the measured results.

    python -m benchmarks.families                  # all classes, into docs/families.json and docs/families.md
    python -m benchmarks.families Llama JetMoe     # only these: print them, and replace their earlier results

`tests/tiny_models.py` makes the models by rules about field names. A class that the rules cannot make small, or that
does not generate unpatched, is listed with the reason. Every other class runs every method in three ways:

- Settings that leave keys out, on two prompts, one of them left-padded, with the cache that `generate` makes. The
  logits must equal those of the model's own eager attention under the masks of the plans that ran.
- Settings that keep everything, on the same prompts. The logits must equal those of the unpatched model.
- Settings that keep everything, on one prompt, with a static cache if the unpatched model answers the same with one.

All runs of a class are forced to generate the same tokens, so that logits can be compared step by step. Each class runs
in its own process with a time limit; a crash becomes a row of the table.

`generating` runs a model. `layers` and `settings` choose the settings of a method. `probe` compares the logits, and
`claims` checks the reasons of refusals. `sweep` goes through the classes, and `page` writes the results.
"""

import sys
from pathlib import Path

if (_TESTS := str(Path(__file__).parents[2] / "tests")) not in sys.path:
    sys.path.append(_TESTS)
