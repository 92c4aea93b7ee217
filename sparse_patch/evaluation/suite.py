"""Run several configurations on the offline tasks, always together with dense attention.

Data flows one way: `Evaluation` (what is asked) -> `Record` (one prompt under one configuration) -> `Row` (one
configuration on one task at one length) -> table, JSON, picture. Rows are made only from records, and each record is
written to a journal as it comes. So a run that was killed continues where it stopped and ends with the same rows.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sparse_patch.config import PatchConfig, load_config
from sparse_patch.errors import TaskError
from sparse_patch.evaluation.damage import damage, predict
from sparse_patch.evaluation.results import Key, Record, Row, rows
from sparse_patch.evaluation.scoring import found
from sparse_patch.integration.patching import patched
from sparse_patch.integration.reporting import sparsity_report, versions
from sparse_patch.models.loading import check_context
from sparse_patch.report import SparsityReport
from sparse_patch.workbench.generation import continue_greedily, encode, force, prefill, stop_tokens
from sparse_patch.workbench.journal import Journal
from sparse_patch.workbench.machine import machine
from sparse_patch.workbench.progress import Step
from sparse_patch.workbench.tasks import Sample, Task

DENSE = "dense"
_WARM_UP_TOKENS = 6144  # longer than the default min_length, so that the sparse path is warm too


@dataclass(frozen=True)
class Evaluation:
    """What to measure.

    Attributes:
        configs: label -> configuration; `configurations` makes them, the dense one first.
        tasks: the tasks.
        lengths: tokens of the prompts.
        samples: prompts of each task and length.
        seed: chooses the prompts.
        haystack: text to hide things in; None for Python's help topics.
    """

    configs: dict[str, PatchConfig]
    tasks: Sequence[Task]
    lengths: Sequence[int]
    samples: int = 10
    seed: int = 0
    haystack: str | None = None

    def prompts(self) -> Iterator[tuple[Task, int, int]]:
        """Yield (task, length, index of the sample) of every prompt, in the order of the run."""
        return (
            (task, length, index) for length in self.lengths for task in self.tasks for index in range(self.samples)
        )

    def keys(self, task: Task, length: int, index: int) -> dict[str, Key]:
        """Configuration -> key of the record of one prompt."""
        return {
            label: (label, config.fingerprint(), task.name, length, index) for label, config in self.configs.items()
        }

    def missing(self, journal: Journal[Record]) -> int:
        """Number of records that the journal does not have yet."""
        return sum(key not in journal.records for prompt in self.prompts() for key in self.keys(*prompt).values())

    def sample(self, tokenizer: Any, task: Task, length: int, index: int) -> Sample:
        return task.sample(tokenizer, length, self.seed, index, self.haystack)


@dataclass(frozen=True)
class Asked:
    """A sample, with the tokens of its prompt and of its answer (of a compared sample, those that are compared)."""

    sample: Sample
    tokens: list[int]
    answer: list[int]

    @classmethod
    def of(cls, sample: Sample, tokenizer: Any) -> "Asked":
        tokens, answer = encode(tokenizer, sample.prompt, sample.answer)
        return cls(sample, tokens, answer[: sample.compared or None])


def configurations(sources: Sequence[str]) -> dict[str, PatchConfig]:
    """Load configurations, keyed by the stems of their files, with dense attention first.

    Raises:
        ConfigError: a configuration is not valid.
        TaskError: two of them have the same stem.
    """
    dense = load_config("dense.yaml")
    configs = {DENSE: dense}
    for source in sources:
        label, config = Path(source).stem, load_config(source)
        if label in configs and not (label == DENSE and config.fingerprint() == dense.fingerprint()):
            raise TaskError(f"--config: {source}: there is another configuration called {label!r}; rename the file")
        configs[label] = config
    return configs


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    evaluation: Evaluation,
    journal: Journal[Record],
    progress: Step = lambda _: None,
) -> list[Row]:
    """Run what the journal does not have yet, and return one row for each configuration, task and length.

    Each prompt runs under every configuration before the next prompt, so a slow phase of the machine slows all of them.

    Args:
        model: an unpatched model; it is unpatched afterwards too.
        tokenizer: the model's.
        evaluation: what to measure.
        journal: holds what was measured already; new records are added to it.
        progress: called with a description before each run of a prompt under a configuration.

    Raises:
        TaskError: a prompt cannot be made, or does not fit the model's context. Then nothing is measured.
    """
    _check(model, tokenizer, evaluation)
    warm = False
    for prompt in evaluation.prompts():
        todo = [label for label, key in evaluation.keys(*prompt).items() if key not in journal.records]
        if not todo:
            continue
        sample = evaluation.sample(tokenizer, *prompt)
        asked = Asked.of(sample, tokenizer)
        if not warm:
            _warm_up(model, asked.tokens, evaluation.configs)
            warm = True
        how = compare if sample.compared else score
        for record in how(model, tokenizer, asked, evaluation.configs, todo, progress):
            journal.add(record)
    keys = (key for prompt in evaluation.prompts() for key in evaluation.keys(*prompt).values())
    return rows(journal.records[key] for key in keys)


def score(
    model: PreTrainedModel,
    tokenizer: Any,
    asked: Asked,
    configs: dict[str, PatchConfig],
    labels: Sequence[str],
    progress: Step,
) -> Iterator[Record]:
    """Measure the answers to one prompt under the named configurations.

    The expected answer is fed token by token. This gives token accuracy and exact match, and takes the same decode
    steps under every configuration. At the model's first wrong prediction, free generation continues from a copy of the
    cache, and the score is taken from that text. (Up to this token, or without a mistake, the model generates the
    expected answer anyway.) For a forced sample (`Sample.forced`) the score is taken from the predictions.
    """
    sample = asked.sample
    for label in labels:
        progress(_described(sample, label))
        with patched(model, configs[label]):
            start = prefill(model, asked.tokens, answer=max(len(asked.answer), sample.max_new_tokens))
            forced = force(model, start, asked.answer, fork=not sample.forced)
            report = sparsity_report(model)
            tokens = forced.predicted
            if forced.detour is not None:
                tokens = continue_greedily(model, *forced.detour, sample.max_new_tokens, stop_tokens(model, tokenizer))
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        yield _record(
            sample,
            label,
            configs[label],
            report,
            found=(found(text, sample.outputs), len(sample.outputs)),
            right=(sum(forced.right), len(forced.right)),
            prefill_s=start.seconds,
            decode_s=forced.seconds,
            text=text,
        )


def compare(
    model: PreTrainedModel,
    tokenizer: Any,
    asked: Asked,
    configs: dict[str, PatchConfig],
    labels: Sequence[str],
    progress: Step,
) -> Iterator[Record]:
    """Compare the named configurations with dense attention on one prompt.

    Dense attention runs first, also if its record is there already: its predictions are in no journal.
    """
    dense: torch.Tensor | None = None
    for label in dict.fromkeys([DENSE, *labels]):
        if label in labels:
            progress(_described(asked.sample, label))
        predicted = predict(model, asked.tokens, asked.answer, configs[label])
        dense = predicted.log_probs if dense is None else dense
        if label in labels:
            right = [guess == token for guess, token in zip(predicted.tokens, asked.answer, strict=True)]
            yield _record(
                asked.sample,
                label,
                configs[label],
                predicted.report,
                right=(sum(right), len(right)),
                damage=damage(dense, predicted.log_probs, asked.answer),
                prefill_s=predicted.prefill_s,
                decode_s=predicted.decode_s,
                text=tokenizer.decode(predicted.tokens, skip_special_tokens=True),
            )


def _record(sample: Sample, label: str, config: PatchConfig, report: SparsityReport, **figures: Any) -> Record:
    return Record(
        config=label,
        fingerprint=config.fingerprint(),
        task=sample.task,
        length=sample.length,
        index=sample.index,
        prefill=report.pairs("prefill"),
        decode=report.pairs("decode"),
        fallbacks=report.fallbacks(),
        **figures,
    )


def _described(sample: Sample, label: str) -> str:
    return f"{sample.task}, {sample.length} tokens, {label}"


def header(model: str, evaluation: Evaluation, haystack: str | None) -> dict[str, Any]:
    """The facts that two runs must share for their records to be merged.

    Args:
        model: the model's name.
        evaluation: what is measured.
        haystack: name of the haystack; None for Python's help topics.
    """
    text = evaluation.haystack
    return {
        "machine": {**machine(), **versions()},
        "model": model,
        "seed": evaluation.seed,
        "haystack": "pydoc_data.topics" if haystack is None else haystack,
        "haystack_sha256": None if text is None else hashlib.sha256(text.encode()).hexdigest()[:12],
    }


def _check(model: PreTrainedModel, tokenizer: Any, evaluation: Evaluation) -> None:
    """Raise everything that can be known to fail before anything is measured."""
    for length in evaluation.lengths:
        for task in evaluation.tasks:
            check_context(model, length, task.max_new_tokens, f"--lengths: {task.name}")
            sample = evaluation.sample(tokenizer, task, length, 0)
            check_context(model, length, sample.max_new_tokens, f"--lengths: {task.name}")
    for config in evaluation.configs.values():
        with patched(model, config):
            pass


def _warm_up(model: PreTrainedModel, tokens: Sequence[int], configs: dict[str, PatchConfig]) -> None:
    for config in configs.values():
        with patched(model, config):
            force(model, prefill(model, tokens[:_WARM_UP_TOKENS], answer=2), tokens[:2])
