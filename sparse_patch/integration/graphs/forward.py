"""The forward of a patched model, which runs decode steps as CUDA graphs if it can."""

from typing import Any

import torch
from transformers import PreTrainedModel

from sparse_patch.integration.graphs.decode_graph import DecodeGraph
from sparse_patch.integration.graphs.inputs import StepInputs, inputs_of
from sparse_patch.integration.patch import Patch
from sparse_patch.integration.step import NotAStep
from sparse_patch.report import COUNTING

FORWARD = "forward"  # an attribute of the model that hides the method of its class
_GRAPH = "sparse_patch_graph"  # an attribute of a cache


class GraphForward:
    """Stands in for the forward of a patched model.

    A forward of one token for each row, on a GPU, with the cache that `generate` makes, is a step (`DecodeGraph`). If
    it cannot be one, the report says why. Every other forward is that of the model.

    Attributes:
        root: the model.
        before: the attribute `forward` that the model had before; None if it had only the method of its class.
    """

    def __init__(self, root: PreTrainedModel) -> None:
        self.root, self.before = root, vars(root).get(FORWARD)

    @property
    def __wrapped__(self) -> Any:
        """The model's own forward, of which this object has the signature."""
        return getattr(type(self.root), FORWARD).__get__(self.root) if self.before is None else self.before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._model_forward(*args, **kwargs)
        patch = vars(self.root).get("sparse_patch")
        if not isinstance(patch, Patch):
            return self._model_forward(*args, **kwargs)
        try:
            inputs = inputs_of(self.__wrapped__, args, kwargs)
            if inputs is not None:
                return _graph_of(inputs).run(self.__wrapped__, self.root, patch, inputs)
        except NotAStep as reason:
            with COUNTING:
                patch.graphs.eager[str(reason)] += 1
        return self._model_forward(*args, **kwargs)

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call `__wrapped__` in a way that torch.compile can trace; it cannot trace `__get__` (2.11)."""
        if self.before is not None:
            return self.before(*args, **kwargs)
        return getattr(type(self.root), FORWARD)(self.root, *args, **kwargs)


def _graph_of(inputs: StepInputs) -> DecodeGraph:
    graph = getattr(inputs.cache, _GRAPH, None)
    if graph is None:
        graph = DecodeGraph()
        setattr(inputs.cache, _GRAPH, graph)
    return graph


def install(root: PreTrainedModel) -> None:
    """Put a `GraphForward` in the place of a model's forward."""
    vars(root)[FORWARD] = GraphForward(root)


def remove(root: PreTrainedModel) -> None:
    """Undo `install`. If something wrapped the forward since, that stays, and calls the model's own forward."""
    ours = vars(root).get(FORWARD)
    if isinstance(ours, GraphForward):
        del vars(root)[FORWARD]
        if ours.before is not None:
            vars(root)[FORWARD] = ours.before
