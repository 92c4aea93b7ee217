"""Every causal class of Transformers with every method: measured on tiny random models, not written down.

    python -m benchmarks.families                  # all of them, into docs/families.json and docs/families.md
    python -m benchmarks.families Llama JetMoe     # only these, printed and put in place of what was measured before

`tests/tiny_models.py` makes the models by rules about field names. A class that the rules cannot make small, or that
does not generate unpatched, is listed with the reason. Every other one runs every method in three ways:

- settings that leave keys out, on two prompts of which one is padded on the left, with the cache that `generate` makes;
  the logits must be those of the model's own eager attention under the masks of the very plans that ran;
- settings that keep everything, on the same prompts, where the logits must be those of the unpatched model;
- the same on one prompt with a static cache, where the unpatched model answers with one as it does without.

All runs of a class are made to write the same tokens, so that logits can be compared step by step. A class runs in a
process of its own with a limit of time: its crash is a row of the table.

`generating` runs a model, `layers` and `settings` choose for a method -> `probe` compares, `claims` checks refusals ->
`sweep` goes through the classes -> `page` writes them down.
"""

import sys
from pathlib import Path

if (_TESTS := str(Path(__file__).parents[2] / "tests")) not in sys.path:
    sys.path.append(_TESTS)
