"""The offline tasks: RULER's needles and variable tracking, key-value retrieval and reciting, at any prompt length.

`drafts` makes random keys and fits text to a length. `base` defines a task and its samples. `needles`,
`variable_tracking` and `key_value_retrieval` are the tasks with answers that are scored. `continuations` are those in
which the model is compared with dense attention, token by token. `table` names them and their suites. `export` writes
samples.

Wording and names are RULER's (Hsieh et al. 2024, arXiv 2404.06654, section 3 and appendix B). The tasks differ from
RULER's code in three points. A prompt has exactly the requested number of tokens, special tokens included and answer
excluded. The text haystack is Python's help topics or a file of the user's, so nothing is downloaded. And one seed,
task, length and index always give the same sample, whatever else is generated with it.
"""

from sparse_patch.workbench.tasks.base import Question, Sample, Task
from sparse_patch.workbench.tasks.drafts import distinct, draw, filling, first_fit
from sparse_patch.workbench.tasks.export import as_json, export_jsonl
from sparse_patch.workbench.tasks.needles import NEEDLE, OPENING, NeedleTask
from sparse_patch.workbench.tasks.table import SUITES, TASKS, tasks_of

__all__ = [
    "NEEDLE",
    "OPENING",
    "SUITES",
    "TASKS",
    "NeedleTask",
    "Question",
    "Sample",
    "Task",
    "as_json",
    "distinct",
    "draw",
    "export_jsonl",
    "filling",
    "first_fit",
    "tasks_of",
]
