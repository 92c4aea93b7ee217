"""What a patched attention module carries."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sparse_patch.call import Phase
from sparse_patch.config import PatchConfig
from sparse_patch.integration.forward import PatchMark
from sparse_patch.integration.transformers_internals import implementation_of
from sparse_patch.methods.base.protocol import DecodeMethod
from sparse_patch.plans import Plan
from sparse_patch.report import LayerCounts
from sparse_patch.tensor_parallel import HeadShard

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


@dataclass
class LayerState:
    """What a patched attention module carries, as its attribute `sparse_patch`.

    It is the same for all forwards; what belongs to one travels with that forward's mask and cache. The counts are the
    only thing that a forward changes.

    Attributes:
        name: dotted path of the module in its model.
        layer: index of the layer.
        cache_layer: index of the layer whose keys it reads: its own, but where layers share keys.
        kind: its attention in the model itself, "full", "sliding", ...
        config: the configuration; shared by all layers.
        patch: tells this patch of the model from others; shared by all layers.
        phases: phases in which this layer uses the configured method; it is dense in the others.
        original_config: the Transformers config that the module has without the patch.
        dense: the attention function of the implementation that the model had before.
        warned: reasons that were warned about; shared by all layers.
        shard: the heads that this process has, where tensor parallelism splits them; shared by all layers.
        counts: what was computed, for the report.
        captured: when not None, the plans of the calls that ran, newest last.
        decoder: its sparse decode method.
        remembers: whether that keeps something beside the keys.
        has_weights: whether the implementation that the model had gives attention weights.
    """

    name: str
    layer: int
    cache_layer: int
    kind: str
    config: PatchConfig
    patch: PatchMark
    phases: frozenset[Phase]
    original_config: Any
    dense: AttentionFunction
    warned: set[str]
    shard: HeadShard
    counts: LayerCounts = field(default_factory=LayerCounts)
    captured: list[tuple[Phase, Plan]] | None = None
    decoder: DecodeMethod | None = field(init=False)
    remembers: bool = field(init=False)
    has_weights: bool = field(init=False)

    def __post_init__(self) -> None:
        self.has_weights = implementation_of(self.original_config) in (None, "eager")
        method = self.config.decode if "decode" in self.phases else None
        self.decoder = method if isinstance(method, DecodeMethod) else None
        self.remembers = self.decoder is not None and type(self.decoder).remember is not DecodeMethod.remember
