"""What a patched attention module carries."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sparse_patch.call import Phase
from sparse_patch.config import PatchConfig
from sparse_patch.integration.forward import PatchMark
from sparse_patch.integration.transformers_internals import implementation_of
from sparse_patch.methods.base.bound import BoundMethod
from sparse_patch.plans import Plan
from sparse_patch.report import CompiledCounts, LayerCounts
from sparse_patch.tensor_parallel import HeadShard

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


@dataclass
class LayerState:
    """What a patched attention module carries, as its attribute `sparse_patch`.

    The state is the same for all forwards. What belongs to one forward travels with that forward's mask and cache. A
    forward changes only the counts.

    Attributes:
        name: dotted path of the module in its model.
        layer: index of the layer.
        cache_layer: index of the layer whose keys it reads; differs from `layer` if layers share keys.
        kind: kind of attention that the layer has in the model: "full", "sliding", ...
        config: the configuration; shared by all layers.
        patch: distinguishes this patch of the model from others; shared by all layers.
        methods: the methods that plan the layer's calls, by phase; the layer is dense in the other phases.
        original_config: the Transformers config that the module has without the patch.
        dense: the attention function of the implementation that the model had before.
        warned: reasons that were warned about; shared by all layers.
        shard: the heads that this process has, if tensor parallelism splits them; shared by all layers.
        counts: what was computed, for the report.
        in_graphs: what `torch.compile` graphs computed and `counts` does not have yet; None if not known on which
            device the layer runs.
        captured: the plans of the calls that ran, newest last; None if they are not captured.
        decoder: the method that plans decode; None if decode is dense.
        has_weights: whether the implementation that the model had before gives attention weights.
    """

    name: str
    layer: int
    cache_layer: int
    kind: str
    config: PatchConfig
    patch: PatchMark
    methods: Mapping[Phase, BoundMethod]
    original_config: Any
    dense: AttentionFunction
    warned: set[str]
    shard: HeadShard
    counts: LayerCounts = field(default_factory=LayerCounts)
    in_graphs: CompiledCounts | None = None
    captured: list[tuple[Phase, Plan]] | None = None
    decoder: BoundMethod | None = field(init=False)
    has_weights: bool = field(init=False)

    def __getstate__(self) -> dict[str, Any]:
        """The state for a copy of a patched model, with all counts."""
        self.patch.settle()
        return vars(self)

    def __post_init__(self) -> None:
        self.has_weights = implementation_of(self.original_config) in (None, "eager")
        self.decoder = self.methods.get("decode")

    def serve_graphs(self, query: torch.Tensor) -> None:
        """Outside of a graph: see to it that graphs can count calls with such queries `[B, Hq, Sq, D]`."""
        if self.in_graphs is None or not self.in_graphs.serves(query):
            self.settle()
            self.in_graphs = CompiledCounts.zeros(query.shape[1], query.device)

    def settle(self) -> None:
        """Move what `torch.compile` graphs counted into `counts`."""
        if self.in_graphs is not None:
            self.in_graphs.move_to(self.counts)

    @property
    def keeps_state(self) -> bool:
        """Whether the decode method maintains per-layer state in the cache."""
        return self.decoder is not None and self.decoder.keeps_state
