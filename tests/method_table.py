"""One table of all methods. The shared tests in `test_methods.py` run each row through the same checks.

A new method adds a row. `small` settings select a part of a call of a few hundred tokens; `full` settings keep all.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparse_patch.artefacts.head_schedules import HeadSchedules, duo_schedules, write_head_schedules
from sparse_patch.model_shape import ModelShape
from sparse_patch.testing.check import SMALL_MODEL


@dataclass(frozen=True)
class MethodCase:
    """Settings of one method, for the shared tests."""

    small: dict[str, Any]
    full: dict[str, Any]

    @property
    def name(self) -> str:
        variant = (
            self.small.get(key) for key in ("selection", "index_sharing", "group_score", "current_page", "numerics")
        )
        parts = self.small["method"], *variant, "last" if self.small.get("last") else None
        return "-".join(str(part) for part in parts if part)


def _flexprefill(selection: str, **changes: Any) -> MethodCase:
    base = {"method": "flexprefill", "selection": selection, "block_size": 16, "min_length": 0}
    return MethodCase(
        small={**base, "gamma": 0.7, "tau": 0.2, "min_budget": 32, **changes},
        full={**base, "gamma": 1.0},
    )


def _minference() -> MethodCase:
    base = {"method": "minference", "block_size": 16, "min_length": 0}
    return MethodCase(
        small={**base, "vertical": 40, "slash": 104},
        full={**base, "vertical": 400, "slash": 100},
    )


def _a_shape(last: int) -> MethodCase:
    base = {"method": "a_shape", "block_size": 16, "min_length": 0, "last": last}
    return MethodCase(
        small={**base, "sink": 20, "window": 50},
        full={**base, "sink": 20, "window": 380},
    )


def _xattention(**changes: Any) -> MethodCase:
    base = {"method": "xattention", "stride": 4, "block_size": 16, "min_length": 0}
    return MethodCase(small={**base, **changes}, full={**base, "threshold": 1.0})


def _spargeattn(selection: str, **changes: Any) -> MethodCase:
    base = {"method": "spargeattn", "selection": selection, "block_size": 16, "min_length": 0}
    return MethodCase(small={**base, **changes}, full={**base, "topk": 1.0, "cdf_threshold": 1.0})


def _sale(**changes: Any) -> MethodCase:
    base = {"method": "sale", "window": 32, "block_size": 64, "min_length": 0}
    return MethodCase(small={**base, **changes}, full={**base, "tau": 0.0})


PREFILL_METHODS = [
    _flexprefill("reference"),
    _flexprefill("coverage", gamma=0.5, min_budget=16),
    _minference(),
    _a_shape(last=0),
    _a_shape(last=30),
    _xattention(threshold=0.7),
    _spargeattn("topk", topk=0.3),
    _spargeattn("cdf", cdf_threshold=0.8, similarity_threshold=0.55, attention_sink=True, pv_threshold=4.0),
    _sale(tau=1.0, numerics="int8"),
    _sale(tau=1.0, numerics="int4"),
]

# Methods that give every token its own blocks, for prefill and decode.
TOKEN_METHODS = [
    MethodCase(
        small={"method": "infllmv2", "topk": 3, "window_size": 64, "min_length": 0},
        full={"method": "infllmv2", "topk": 400, "window_size": 64, "min_length": 0},
    ),
]

# The model that decode methods are resolved for: layer 0 is full, 1 and 3 select (if layers have roles).
TWO_LAYERS = replace(SMALL_MODEL, num_layers=2)  # for what is slow: layer 0 selects
_ROLES = {"full": [0], "select": [1, 3]}


def _decode(method: str, budget: int, **settings: Any) -> MethodCase:
    base = {"method": method, "min_length": 0, **settings}
    return MethodCase(small={**base, "budget": budget}, full={**base, "budget": 400})


def _layered(method: str, budget: int, **settings: Any) -> MethodCase:
    return _decode(method, budget, roles=_ROLES, **settings)


def _quest(**settings: Any) -> MethodCase:
    return _decode("quest", 96, page_size=8, layers={"exclude": [0]}, **settings)


DECODE_METHODS = [
    _layered("tidaldecode", 48, index_sharing="q_head"),
    _layered("tidaldecode", 48, index_sharing="kv_group", force_current=False),
    _layered("tidaldecode", 48, index_sharing="all"),
    _layered("delta", 96, page_size=8, recency_pages=3),
    _layered("lessismore", 60),
    _quest(index_sharing="q_head", current_page="scored"),
    _quest(index_sharing="kv_group", group_score="sum", current_page="forced"),
    _quest(index_sharing="kv_group", group_score="max", current_page="added"),
    _decode("kinetics", 100, block_size=8, sink=4, window=20),
]

# TidalDecode that reads every token again, densely, before the next one.
CORRECTED = _decode("tidaldecode", 48, roles=_ROLES, correction_period=1)

# Methods of spans, for prefill and decode; `write_plans` writes the files.
SPAN_METHODS = [
    MethodCase(
        small={"method": "streamingllm", "sink": 5, "window": 50},
        full={"method": "streamingllm", "sink": 5, "window": 400},
    ),
    MethodCase(
        small={"method": "moa", "calibration": "short.json", "max_length": 420},
        full={"method": "moa", "calibration": "full.json"},
    ),
    MethodCase(
        small={"method": "duoattention", "calibration": "gates.tsv", "sink": 8, "window": 120},
        full={"method": "duoattention", "calibration": "gates.tsv", "sparsity": 0.0},
    ),
]


def write_plans(folder: Path, shape: ModelShape) -> None:
    """Write the files that rows of `SPAN_METHODS` name, for a model."""
    layers, heads = range(shape.num_layers), range(shape.num_kv_heads)
    alphas, betas = ([[pair[head % 2] for head in heads] for _ in layers] for pair in ((24, 60), (0, 0.1)))
    write_head_schedules(folder / "short.json", HeadSchedules.of(shape, alphas, betas, sink=5, block=4, min_span=8))
    write_head_schedules(
        folder / "full.json", duo_schedules(shape, {(layer, head) for layer in layers for head in heads})
    )
    gates = "\t".join(("0.9", "0.1")[head % 2] for head in heads)
    (folder / "gates.tsv").write_text(f"{gates}\n" * shape.num_layers)


def configurations(folder: Path, full: bool = False, layers: int = 5) -> dict[str, dict[str, Any]]:
    """Name -> configuration, for each row of the tables. The files that some of them name are in the folder.

    Args:
        folder: the folder that `write_plans` wrote to.
        full: whether to use the settings that keep everything.
        layers: layers of the model: five as in `SMALL_MODEL`, or two.
    """
    phases = {
        "prefill": PREFILL_METHODS,
        "decode": (*DECODE_METHODS, CORRECTED),
        "both": (*SPAN_METHODS, *TOKEN_METHODS),
    }
    return {
        case.name: {phase: _on_layers(in_folder(case.full if full else case.small, folder), layers)}
        for phase, cases in phases.items()
        for case in cases
    }


def _on_layers(settings: dict[str, Any], layers: int) -> dict[str, Any]:
    """Settings with roles for the layers of a model with `layers` layers."""
    return (
        {**settings, "roles": {"full": [], "select": [0]}}
        if settings.get("roles") == _ROLES and layers == 2
        else settings
    )


def in_folder(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Settings with the path of their file, if they name one, in a folder."""
    return {**settings, "calibration": str(folder / settings["calibration"])} if "calibration" in settings else settings
