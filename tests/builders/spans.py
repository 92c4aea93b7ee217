"""Models with methods of spans, the batches that they read, and what their heads see by the oracle."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from oracles.span_oracle import Spans, moa_current_window, moa_window, spans_by_mask
from transformers import DynamicCache, PreTrainedModel

from sparse_patch.artefacts.head_schedules import HeadSchedules, write_head_schedules
from sparse_patch.model_shape import ModelShape

LENGTH, NEW = 70, 30  # with windows of 5 to 35 tokens, rings turn in the prompt and in the answer
SIZES = {"sink": 3, "block": 4, "min_span": 8}
RULES = [[(0, 1), (12, 0)], [(8, 0.25), (0, 0.1)], [(30, 0), (8, 0)]]  # alpha and beta of layers and KV heads


def shape_of(model: PreTrainedModel) -> ModelShape:
    return ModelShape.of(model.config, model.config.num_hidden_layers)


def full_layers(model: PreTrainedModel) -> list[int]:
    return sorted(set(range(model.config.num_hidden_layers)) - shape_of(model).local_layers)


def rules_of(model: PreTrainedModel) -> HeadSchedules:
    heads = model.config.num_key_value_heads
    alphas, betas = ([[rule[part] for rule in row[:heads]] for row in RULES] for part in (0, 1))
    return HeadSchedules.of(shape_of(model), alphas, betas, **SIZES)


def moa(folder: Path, model: PreTrainedModel, rules: HeadSchedules | None = None, **settings: Any) -> dict[str, Any]:
    """A configuration with a plan that is written to the folder."""
    write_head_schedules(folder / "plan.json", rules or rules_of(model))
    both = {"method": "moa", "calibration": str(folder / "plan.json"), **settings}
    return {"both": both, "on_unsupported": "error"}


def moa_spans(model: PreTrainedModel, length: int) -> dict[int, Spans]:
    """What the plan means at a total length, by the formula."""
    heads = model.config.num_key_value_heads
    return {
        layer: [(SIZES["sink"], moa_window(*rule, length, **SIZES)) for rule in RULES[layer][:heads]]
        for layer in full_layers(model)
    }


def current_spans(model: PreTrainedModel) -> dict[int, Spans]:
    """What the plan means where the length is that of a query's own prefix."""
    heads, sink, least = model.config.num_key_value_heads, SIZES["sink"], SIZES["min_span"]
    return {
        layer: [(sink, moa_current_window(*rule, sink, least)) for rule in RULES[layer][:heads]]
        for layer in full_layers(model)
    }


def batch_of(length: int = LENGTH, pad: int = 9, rows: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[-1, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: PreTrainedModel, batch: dict[str, torch.Tensor], new: int = NEW, **options: Any) -> Any:
    settings: dict[str, Any] = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, **options}
    return model.generate(**batch, max_new_tokens=new, **settings)  # type: ignore[operator]


@torch.no_grad()
def fed(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], pieces: Sequence[int], cache: Any, begin: int = 0
) -> torch.Tensor:
    """Logits of a batch that is fed in pieces, from token `begin` on."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = []
    for piece in pieces:
        now = slice(begin, begin + piece)
        inputs = {"input_ids": ids[:, now], "attention_mask": mask[:, : now.stop], "position_ids": positions[:, now]}
        logits.append(model(**inputs, past_key_values=cache).logits)
        begin += piece
    return torch.cat(logits, 1)


def by_mask(model: PreTrainedModel, batch: dict[str, torch.Tensor], spans: dict[int, Spans]) -> torch.Tensor:
    """Logits of one forward of the oracle."""
    with spans_by_mask(model, spans):
        return fed(model, batch, [batch["input_ids"].shape[1]], DynamicCache(config=model.config))


def close(found: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    if mask is not None:
        found, expected = found[mask.bool()], expected[mask.bool()]
    torch.testing.assert_close(found, expected, atol=3e-4, rtol=1e-4)
