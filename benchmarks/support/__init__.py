"""Measure on tiny random models what runs sparsely on which model, and write the results.

    python -m benchmarks.support                 # everything, into docs/support.json and docs/models.md
    python -m benchmarks.support gemma3 llama4   # these families again; the results of the others are kept
    python -m benchmarks.support quest           # this method again, on every family

Every family runs every method on a prompt longer than the method's `min_length` and a few more tokens: in manual
forwards, and through `generate` with the cache that it makes, with a static cache, and with a static cache whose decode
step is compiled. The page shows the sparsity report of each run. A run counts only if its logits are right; the page
says what they are compared with.

`rows` names the families, `probe` measures one of them, and `page` writes the results. The tiny models are those of
`tests/`.
"""

import sys
from pathlib import Path

if (_TESTS := str(Path(__file__).parents[2] / "tests")) not in sys.path:
    sys.path.append(_TESTS)
