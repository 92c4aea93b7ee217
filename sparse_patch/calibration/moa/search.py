"""The whole search: profile, choose, validate. A run that was killed continues from its journal."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from rich.table import Table
from transformers import PreTrainedModel

from sparse_patch.artefacts.head_schedules import HeadSchedules, write_head_schedules
from sparse_patch.calibration.base import Calibration, shape_of
from sparse_patch.calibration.moa.candidates import Candidate, Profile
from sparse_patch.calibration.moa.influence import influence_of_prompt
from sparse_patch.calibration.moa.prompts import Prompt, answer_of, check_lengths, pieces, task_prompts
from sparse_patch.calibration.moa.records import RECORD, Answered, Profiled, Scored, Settings, profiled
from sparse_patch.calibration.moa.report import Found, as_json, spans_table, table
from sparse_patch.calibration.moa.schedules import least_density
from sparse_patch.calibration.moa.validate import loss_under
from sparse_patch.errors import TaskError
from sparse_patch.model_shape import ModelShape
from sparse_patch.workbench.journal import Journal
from sparse_patch.workbench.progress import Step


def search(
    model: PreTrainedModel,
    tokenizer: Any,
    settings: Settings,
    journal: Journal[Any],
    progress: Step = lambda _: None,
) -> Found:
    """Search head schedules. Records that the journal already has are not measured again.

    Args:
        model: an unpatched model in evaluation mode; it is left as it was.
        tokenizer: the model's.
        settings: settings of the search.
        journal: each measurement is added to it.
        progress: called with a description before each prompt that is read.

    Raises:
        PatchError: the model is already patched, or cannot be patched.
        TaskError: a setting does not fit the model, or no schedules are within the density.
    """
    _check(model, settings)
    prompts = _prompts(model, tokenizer, settings)

    def answered(length: int, number: int) -> Prompt:
        return _answered(model, tokenizer, journal, length, number, prompts[length][number])

    measured = _measured(model, settings, journal, answered, progress)
    profile = Profile.of(settings, shape_of(model), measured)
    score = partial(_score, model, settings, journal, answered, progress)
    dense, plans = score("dense", None), profile.plans()
    for number in _even(plans, settings.plans):
        plans[number] = replace(plans[number], loss=score(plans[number].name, plans[number].rules))
    scored = [(one.loss, one) for one in plans if one.loss is not None]
    chosen = min(scored, key=lambda pair: pair[0])[1]
    baselines = [replace(one, loss=score(one.name, one.rules)) for one in profile.baselines(chosen.rules)]
    rules = chosen.rules.model_copy(update={"measured": _measured_of(settings, dense, chosen, baselines)})
    return Found(profile, dense, plans, baselines, replace(chosen, rules=rules))


def _check(model: PreTrainedModel, settings: Settings) -> None:
    check_lengths(model, settings.lengths, "--lengths")
    check_lengths(model, [settings.unseen], "--validate-length")
    if settings.unseen in settings.lengths:
        raise TaskError(f"--validate-length: {settings.unseen} is among --lengths; name one that is not")
    least = least_density(settings.lengths, (*settings.lengths, settings.unseen))
    if not least <= settings.density <= 1:
        raise TaskError(
            f"--density: expected a share from {least:.3f} (the shortest spans, at the shortest length) to 1, got "
            f"{settings.density}"
        )


def _prompts(model: PreTrainedModel, tokenizer: Any, settings: Settings) -> dict[int, list[Prompt]]:
    """Length -> its prompts, the unseen length included."""
    number = {**dict.fromkeys(settings.lengths, settings.samples), settings.unseen: settings.validate_samples}
    if settings.text is None:
        make = partial(task_prompts, tokenizer, settings.tasks, seed=settings.seed, answers=settings.answers)
        return {length: make(length, samples) for length, samples in number.items()}
    lengths = [length for length, samples in number.items() for _ in range(samples)]
    texts = iter(pieces(model, tokenizer, Path(settings.text), lengths))
    return {length: [next(texts) for _ in range(samples)] for length, samples in number.items()}


def _answered(
    model: PreTrainedModel, tokenizer: Any, journal: Journal[Any], length: int, number: int, prompt: Prompt
) -> Prompt:
    """The prompt with its answer, or with the model's answer if it has none."""
    if prompt.answer:
        return prompt
    key = ("answer", length, number)
    if key not in journal.records:
        journal.add(Answered(length, number, answer_of(model, tokenizer, prompt.tokens)))
    return replace(prompt, answer=journal.records[key].answer)


def _measured(
    model: PreTrainedModel,
    settings: Settings,
    journal: Journal[Any],
    answered: Callable[[int, int], Prompt],
    progress: Step,
) -> list[Profiled]:
    """Measure every prompt of the profiled lengths."""
    keys = [("profile", length, number) for length in settings.lengths for number in range(settings.samples)]
    for key in keys:
        if key not in journal.records:
            _, length, number = key
            progress(f"influence at {length} tokens, prompt {number + 1}")
            prompt = answered(length, number)
            found, loss = influence_of_prompt(model, prompt.tokens, prompt.answer, settings.objective)
            if not found:
                raise TaskError("--model: no layer of this model has full attention, see `sparse-patch show`")
            if len({len(one.sink) for one in found.values()}) > 1:
                raise TaskError("--model: its layers differ in their KV heads; schedules have as many rules in each")
            journal.add(profiled(length, number, prompt.task, found, loss))
    return [journal.records[key] for key in keys]


def _score(
    model: PreTrainedModel,
    settings: Settings,
    journal: Journal[Any],
    answered: Callable[[int, int], Prompt],
    progress: Step,
    name: str,
    rules: HeadSchedules | None,
) -> float:
    """Mean cross-entropy of the answers at the unseen length, under schedules or, for None, with dense attention."""
    digest = "dense" if rules is None else _digest(rules)
    keys = [("score", digest, settings.unseen, number) for number in range(settings.validate_samples)]
    for number, key in enumerate(keys):
        if key not in journal.records:
            progress(f"{name} at {settings.unseen} tokens, prompt {number + 1}")
            loss = loss_under(model, rules, settings.unseen, answered(settings.unseen, number))
            journal.add(Scored(digest, settings.unseen, number, loss))
    return fmean(journal.records[key].loss for key in keys)


def _even(plans: Sequence[Candidate], most: int) -> list[int]:
    """Indices of the schedules nearest to the best at all lengths, relative to the range of losses at each length."""
    losses = np.array([plan.predicted for plan in plans])
    best, worst = losses.min(0), losses.max(0)
    distance = ((losses - best) / np.where(worst > best, worst - best, 1.0)).sum(1)
    return sorted(np.argsort(distance, kind="stable")[:most].tolist())


def _digest(rules: HeadSchedules) -> str:
    data = rules.model_dump(exclude={"header", "measured"})
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:12]


def _measured_of(settings: Settings, dense: float, chosen: Candidate, baselines: Sequence[Candidate]) -> dict[str, Any]:
    """The measurements of the chosen schedules, as JSON values."""
    return {
        "predicted": dict(zip(map(str, (*settings.lengths, settings.unseen)), chosen.predicted, strict=True)),
        "validated": {"dense": dense, "plan": chosen.loss, **{one.name: one.loss for one in baselines}},
    }


@dataclass(frozen=True)
class MoACalibration(Calibration[Found]):
    """The search for head schedules, from the influence of far keys on the answers to long prompts.

    Attributes:
        options: settings of the search.
    """

    name = "moa"
    record = RECORD
    makes = "head schedules"
    used_by = "both.calibration"

    options: Settings

    @property
    def settings(self) -> dict[str, Any]:
        return {**json.loads(json.dumps(asdict(self.options))), "validate_length": self.options.unseen}

    @property
    def measured(self) -> dict[str, Any]:
        return self.options.measured

    def steps(self, shape: ModelShape) -> int:
        return self.options.steps

    def search(self, model: PreTrainedModel, tokenizer: Any, journal: Journal[Any], progress: Step) -> Found:
        return search(model, tokenizer, self.options, journal, progress)

    def table(self, found: Found) -> list[Table]:
        return [table(found), spans_table(found)]

    def write(self, path: Path, found: Found, shape: ModelShape, model_id: str) -> None:
        header = {"header": self.header(shape, model_id)}
        write_head_schedules(path, found.chosen.rules.model_copy(update=header))

    def as_json(self, found: Found, shape: ModelShape, model_id: str) -> dict[str, Any]:
        return as_json(found)
