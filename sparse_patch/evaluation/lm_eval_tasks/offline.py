"""The functions that the YAML files of this folder name: documents of an offline task, and their scores."""

from typing import Any


def documents(
    task: str,
    max_seq_lengths: list[int] | int = 4096,
    num_samples: int = 20,
    seed: int = 0,
    haystack: str | None = None,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    **_: Any,
) -> dict[str, Any]:
    """The samples of a task in lm-eval's format. lm-eval passes `--metadata` and `--model_args` as arguments.

    Args:
        task: name of the task.
        max_seq_lengths: tokens of the prompts; the name is RULER's.
        num_samples: number of prompts per length.
        seed: determines the prompts.
        haystack: a text file to hide things in; by default Python's help topics.
        tokenizer: the tokenizer that counts tokens; by default that of `pretrained`.
        pretrained: the model.

    Raises:
        TaskError: no tokenizer is named, a number is not valid, or a prompt cannot be made.
    """
    from datasets import Dataset

    from sparse_patch.errors import TaskError, short
    from sparse_patch.models.loading import load_tokenizer
    from sparse_patch.workbench.prompts import read_haystack
    from sparse_patch.workbench.tasks import TASKS, as_json

    name = tokenizer or pretrained
    if not isinstance(name, str):
        raise TaskError(f"needle_{task}: tokenizer: missing; pass metadata={{'tokenizer': PATH}} with a model object")
    counter = load_tokenizer(name, "tokenizer")
    text = None if haystack is None else read_haystack(haystack)
    lengths = max_seq_lengths if isinstance(max_seq_lengths, list | tuple) else [max_seq_lengths]
    for field, numbers in (("max_seq_lengths", lengths), ("num_samples", [num_samples])):
        if not numbers or not all(type(number) is int and number > 0 for number in numbers):
            raise TaskError(f"needle_{task}: metadata: {field}: expected 1 or more, got {short(numbers)}")
    samples = [
        TASKS[task].sample(counter, length, seed, index, text) for length in lengths for index in range(num_samples)
    ]
    return {"test": Dataset.from_list([as_json(sample) for sample in samples])}


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """RULER's score and exact match of one answer. The score is also given under a key with the prompt's length."""
    from sparse_patch.evaluation.scoring import exact_match, found

    score = found(results[0], doc["outputs"]) / len(doc["outputs"])
    return {
        "score": score,
        "exact_match": float(exact_match(results[0], doc["answer"])),
        f"score_{doc['length']}": score,
    }
