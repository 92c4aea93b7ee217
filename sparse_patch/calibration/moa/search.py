"""The whole search: profile, choose, validate. A run that was killed goes on from its journal."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from sparse_patch.calibration.moa.candidates import Candidate, Profile
from sparse_patch.calibration.moa.influence import influence_of_prompt
from sparse_patch.calibration.moa.optimise import require_scipy
from sparse_patch.calibration.moa.prompts import Prompt, answer_of, check_lengths, pieces, task_prompts
from sparse_patch.calibration.moa.records import Answered, Profiled, Scored, Settings, profiled
from sparse_patch.calibration.moa.report import Found
from sparse_patch.calibration.moa.validate import loss_under_masks
from sparse_patch.errors import TaskError
from sparse_patch.evaluation.journal import Journal
from sparse_patch.methods.span_plans import SpanRules
from sparse_patch.model_shape import ModelShape
from sparse_patch.progress import Step
from sparse_patch.version import __version__


def search(
    model: PreTrainedModel,
    tokenizer: Any,
    settings: Settings,
    journal: Journal[Any],
    progress: Step = lambda _: None,
) -> Found:
    """Search a plan; what the journal has is not measured again.

    Args:
        model: not patched, in evaluation mode; it is left so.
        tokenizer: the model's.
        settings: what is searched for.
        journal: gets everything as it is measured.
        progress: called with a description before each prompt that is read.

    Raises:
        PatchError: the model is patched already, or cannot be.
        TaskError: a setting does not fit the model, or no plan is within the density.
        SparsePatchError: scipy is not installed.
    """
    require_scipy()
    _check(model, settings)
    prompts = _prompts(model, tokenizer, settings)

    def answered(length: int, number: int) -> Prompt:
        return _answered(model, tokenizer, journal, length, number, prompts[length][number])

    measured = _measured(model, settings, journal, answered, progress)
    shape = ModelShape.of(model.config, model.config.get_text_config(decoder=True).num_hidden_layers)
    profile = Profile.of(settings, shape, measured)
    score = partial(_score, model, settings, journal, answered, progress)
    dense, plans = score("dense", None), profile.plans()
    for number in _spread(len(plans), settings.plans):
        plans[number] = replace(plans[number], loss=score(plans[number].name, plans[number].rules))
    scored = [(one.loss, one) for one in plans if one.loss is not None]
    chosen = min(scored, key=lambda pair: pair[0])[1]
    baselines = [replace(one, loss=score(one.name, one.rules)) for one in profile.baselines(chosen.rules)]
    rules = chosen.rules.model_copy(update={"provenance": _provenance(settings, dense, chosen, baselines)})
    return Found(profile, dense, plans, baselines, replace(chosen, rules=rules))


def _check(model: PreTrainedModel, settings: Settings) -> None:
    check_lengths(model, settings.lengths, "--lengths")
    check_lengths(model, [settings.unseen], "--validate-length")
    if settings.unseen in settings.lengths:
        raise TaskError(f"--validate-length: {settings.unseen} is among --lengths; plans are chosen at an unseen one")
    if not 0 < settings.density <= 1:
        raise TaskError(f"--density: expected a share above 0 and up to 1, got {settings.density}")


def _prompts(model: PreTrainedModel, tokenizer: Any, settings: Settings) -> dict[int, list[Prompt]]:
    """The prompts of each length, the unseen one too."""
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
    """The prompt with an answer, the model's where it has none."""
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
    """What every prompt of the profiled lengths shows."""
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
                raise TaskError("--model: its layers differ in their KV heads; a plan has as many rules in each")
            journal.add(profiled(length, number, prompt.task, found, loss))
    return [journal.records[key] for key in keys]


def _score(
    model: PreTrainedModel,
    settings: Settings,
    journal: Journal[Any],
    answered: Callable[[int, int], Prompt],
    progress: Step,
    name: str,
    rules: SpanRules | None,
) -> float:
    """Mean cross-entropy of the answers at the unseen length under a plan; densely for None."""
    digest = "dense" if rules is None else _digest(rules)
    keys = [("score", digest, settings.unseen, number) for number in range(settings.validate_samples)]
    for number, key in enumerate(keys):
        if key not in journal.records:
            progress(f"{name} at {settings.unseen} tokens, prompt {number + 1}")
            loss = loss_under_masks(model)(rules, settings.unseen, answered(settings.unseen, number))
            journal.add(Scored(digest, settings.unseen, number, loss))
    return fmean(journal.records[key].loss for key in keys)


def _spread(number: int, most: int) -> list[int]:
    """At most so many of a row of plans, evenly spread, both ends among them."""
    return sorted(set(np.linspace(0, number - 1, min(number, most)).round().astype(int).tolist()))


def _digest(rules: SpanRules) -> str:
    data = rules.model_dump(exclude={"provenance"})
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:12]


def _provenance(settings: Settings, dense: float, chosen: Candidate, baselines: Sequence[Candidate]) -> dict[str, Any]:
    """How a plan was made, as JSON has it."""
    return {
        **settings.measured,
        "density": settings.density,
        "influence": settings.influence,
        "max_rules": settings.max_rules,
        "validate_length": settings.unseen,
        "predicted": dict(zip(map(str, settings.lengths), chosen.predicted, strict=True)),
        "validated": {"dense": dense, "plan": chosen.loss, **{one.name: one.loss for one in baselines}},
        "sparse_patch": __version__,
    }
