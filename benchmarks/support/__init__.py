"""What runs sparsely on which model: measured on tiny random models, not written down.

    python -m benchmarks.support                 # everything, into docs/support.json and docs/models.md
    python -m benchmarks.support gemma3 llama4   # these families again; what there is of the others is kept
    python -m benchmarks.support quest           # this method again, on every family

Every family runs every method: a prompt longer than the method's `min_length` and a few tokens, in forwards by hand
and through `generate`, with the cache that it makes, with a static one, and with a static one whose decode step is
compiled. What the page says is read from the sparsity report of each run, which counts only if its logits are right;
the page says what they are compared with.

`rows` names the families -> `probe` measures one -> `page` writes them down; the tiny models are those of `tests/`.
"""

import sys
from pathlib import Path

if (_TESTS := str(Path(__file__).parents[2] / "tests")) not in sys.path:
    sys.path.append(_TESTS)
