"""The table of tasks, and its suites."""

from collections.abc import Sequence

from sparse_patch.errors import TaskError, nearest
from sparse_patch.workbench.tasks.base import Task
from sparse_patch.workbench.tasks.continuations import Copy, Prose
from sparse_patch.workbench.tasks.key_value_retrieval import KeyValueRetrieval
from sparse_patch.workbench.tasks.needles import NeedleTask, Recite
from sparse_patch.workbench.tasks.variable_tracking import VariableTracking

_TASKS = (
    NeedleTask("niah_single_1", "a number in noise", 128, haystack="noise"),
    NeedleTask("niah_single_2", "a number in a text", 128),
    NeedleTask("niah_single_3", "a UUID in a text", 128, values="uuids"),
    NeedleTask("niah_single_words", "a pair of words in a text", 128, values="words"),
    NeedleTask("niah_multikey_1", "one of four numbers in a text", 128, num_keys=4),
    NeedleTask("niah_multikey_2", "one number among needles", 128, haystack="needles"),
    NeedleTask(
        "niah_multikey_3", "one UUID among needles with UUIDs", 128, haystack="needles", keys="uuids", values="uuids"
    ),
    NeedleTask("niah_multivalue", "four numbers of one key in a text", 128, num_values=4),
    NeedleTask("niah_multiquery", "four numbers of four keys in a text", 128, num_queries=4),
    VariableTracking("vt", "five variables of a chain in noise", 64),
    KeyValueRetrieval("kv_retrieval", "a value of a large JSON object", 128),
    Recite("recite", "every number in a text, in order", 64),
    Copy("copy", "a passage of the text again, after its first words", 64),
    Prose("prose", "how a text goes on", 64),
)
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}
_NIAH = [name for name in TASKS if name.startswith("niah") and name != "niah_single_words"]
SUITES: dict[str, list[str]] = {
    "needle": [name for name in _NIAH if name not in ("niah_multikey_3", "niah_multiquery")] + ["vt", "recite"],
    "niah": _NIAH,
    "ruler": [*_NIAH, "vt"],
    "damage": ["copy", "prose"],
    "all": list(TASKS),
}


def tasks_of(suite: str, names: Sequence[str] = ()) -> list[Task]:
    """The tasks of a suite, or the named tasks, in the order of `TASKS`.

    Raises:
        TaskError: there is no such suite or task.
    """
    if suite not in SUITES:
        raise TaskError(f"--suite: expected one of {', '.join(SUITES)}, got {suite!r}")
    for name in names:
        if name not in TASKS:
            raise TaskError(f"--tasks: there is no task {name!r}{nearest(name, TASKS)}; tasks: {', '.join(TASKS)}")
    chosen = names or SUITES[suite]
    return [task for name, task in TASKS.items() if name in chosen]
