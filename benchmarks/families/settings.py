"""The methods by kind, and the settings of each method for a model."""

from pathlib import Path
from typing import Any

from method_table import DECODE_METHODS, PREFILL_METHODS, SPAN_METHODS, TOKEN_METHODS, write_plans
from transformers import PreTrainedModel

from benchmarks.families.layers import first_full_layer, shape_of
from sparse_patch.methods.base.layered import LayeredMethod
from sparse_patch.methods.base.registry import registry

Settings = dict[str, Any]
CASES = {"prefill": PREFILL_METHODS, "decode": DECODE_METHODS, "spans": SPAN_METHODS, "token blocks": TOKEN_METHODS}
KINDS = {
    "dense": ["dense"],
    **{kind: list(dict.fromkeys(case.small["method"] for case in cases)) for kind, cases in CASES.items()},
}
METHODS = [method for methods in KINDS.values() for method in methods]


def settings_of(name: str, model: PreTrainedModel, folder: Path) -> tuple[Settings, Settings]:
    """Settings of a method that leave out some of `LENGTH` tokens, and settings that keep all of them."""
    if name == "dense":
        return {"both": {"method": "dense"}}, {"both": {"method": "dense"}}
    case = next(case for cases in CASES.values() for case in cases if case.small["method"] == name)
    # Needed because logits of random queries and keys are in the tens, half of a single KV head cannot stream, and
    # there are only four blocks of 64 tokens.
    changes = {
        "sale": {"tau": 1e12},
        "duoattention": {"sparsity": 1.0},
        "infllmv2": {"topk": 2, "init_blocks": 0},
    }.get(name, {})
    shared: Settings = {"layers": "all"}
    if issubclass(registry()[name], LayeredMethod):
        shared = {"roles": {"full": [], "select": [first_full_layer(model)]}}
    if "calibration" in case.small:
        write_plans(folder, shape_of(model))
    phases = registry()[name].phases
    place = phases[0] if len(phases) == 1 else "both"
    made = []
    for settings in ({**case.small, **changes}, case.full):
        files = {"calibration": f"{folder}/{settings['calibration']}"} if "calibration" in settings else {}
        made.append({place: {**settings, **shared, **files}, "on_unsupported": "silent"})
    return made[0], made[1]
