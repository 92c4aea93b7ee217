"""What a patched model carries, and how to find it on a model."""

from dataclasses import dataclass, field
from threading import RLock
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from sparse_patch.config import PatchConfig
from sparse_patch.errors import PatchError
from sparse_patch.integration.forward import PatchMark
from sparse_patch.integration.hook import register
from sparse_patch.integration.layer_state import LayerState
from sparse_patch.integration.names import hook_name, is_hook, unpatched_name
from sparse_patch.integration.tally import Tally
from sparse_patch.integration.transformers_internals import IMPLEMENTATION, implementation_of, set_implementation
from sparse_patch.integration.unpatched import copies_are_plain
from sparse_patch.report import COUNTING, GraphCounts

PATCHING = RLock()


@dataclass
class Patch:
    """What a patched model carries, as its attribute `sparse_patch`: enough to undo the patch.

    Attributes:
        config: the configuration in force.
        attention: the patched attention modules, in the order of their layers.
        own_configs: the model's copies of Transformers configs.
        holders: the modules that were given one of these copies.
        has_spans: whether some layer decodes by spans.
        hooks: the hooks that tell a forward which cache it uses, and those that correct that cache.
        mark: tells forwards whether they still run under this patch.
        graphs: what became of decode steps on a GPU, for the report.
        model_state: the model as the graphs of its caches know it, a `ModelState`. Caches refer to it only weakly, so a
            cache that outlives its model does not keep the weights.
    """

    config: PatchConfig
    attention: list[nn.Module]
    own_configs: list["OwnConfig"]
    holders: list[nn.Module]
    has_spans: bool
    hooks: list[RemovableHandle]
    mark: PatchMark
    graphs: GraphCounts = field(default_factory=GraphCounts)
    model_state: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """The state for a copy of a patched model, which has no graphs."""
        return {**vars(self), "model_state": None}

    @property
    def reaches_attention(self) -> bool:
        """Whether attention still calls the hook; `set_attn_implementation` may have changed that."""
        return all(is_hook(implementation_of(own.copy)) for own in self.own_configs if own.hook is not None)

    @property
    def keeps_plans(self) -> bool:
        """Whether the plans of the calls are being kept, see `capture_plans`."""
        return state_of(self.attention[0]).captured is not None

    def add_graph(self, tally: Tally, seconds: float) -> None:
        """Count a captured graph."""
        self.mark.add(tally)
        with COUNTING:
            self.graphs.captures += 1
            self.graphs.capture_s += seconds


@dataclass
class OwnConfig:
    """A Transformers config that was replaced by a copy.

    Attributes:
        original: the config that the model has without the patch.
        copy: the config that the model has instead.
        attributes: the copy's attributes at the time the model was patched.
        hook: the kind of hook that the copy names, if attention reads the copy; else None.
    """

    original: PreTrainedConfig
    copy: PreTrainedConfig
    attributes: dict[str, Any]
    hook: str | None = None

    def name_hook(self, kind: str) -> None:
        """Make attention that reads the copy call the hook."""
        unpatched = unpatched_name(implementation_of(self.original))
        register(unpatched)
        self.hook = kind
        set_implementation(self.copy, hook_name(unpatched, kind))
        for config in (self.copy, *(getattr(self.copy, name, None) for name in self.copy.sub_configs)):
            if isinstance(config, PreTrainedConfig):
                copies_are_plain(type(config))

    def __getstate__(self) -> dict[str, Any]:
        """The state for a copy of a patched model. With another implementation set since, it has no hook."""
        return {**vars(self), "hook": self.hook if is_hook(implementation_of(self.copy)) else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a patched model that was copied or loaded whole, maybe where nothing was patched yet."""
        vars(self).update(state)
        if self.hook is not None:
            self.name_hook(self.hook)

    def carry_over_changes(self) -> None:
        """Set on the original what was set on the copy while the model was patched (`resize_token_embeddings`, ...)."""
        for key, value in vars(self.copy).items():
            if key != IMPLEMENTATION and self.attributes.get(key, self) is not value:
                setattr(self.original, key, value)


def is_patched(model: nn.Module) -> bool:
    """Whether `patch_model` changed this model and `unpatch_model` has not changed it back yet."""
    return isinstance(getattr(transformers_model(model), "sparse_patch", None), Patch)


def states_on(model: nn.Module) -> list[LayerState]:
    """The states of a patched model's layers, read while no other thread can unpatch the model."""
    with PATCHING:
        return [state_of(module) for module in patch_of(transformers_model(model)).attention]


def state_of(module: nn.Module) -> LayerState:
    """The state of a patched attention module."""
    state = module.sparse_patch
    assert isinstance(state, LayerState)
    return state


def config_of(module: nn.Module) -> PreTrainedConfig:
    config = module.config
    assert isinstance(config, PreTrainedConfig)
    return config


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The Transformers model in a module: the module itself, or the model that a wrapper (a LoRA model, ...) holds.

    Raises:
        PatchError: the module is no Transformers model and holds none.
    """
    if isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                return module
    raise PatchError(f"{type(model).__name__} is not a Transformers model and holds none; pass a PreTrainedModel")


def patch_of(root: PreTrainedModel) -> Patch:
    patch = getattr(root, "sparse_patch", None)
    if not isinstance(patch, Patch):
        raise PatchError(f"{type(root).__name__} is not patched; call patch_model first")
    return patch
