"""What the layers of one forward share. It travels with the mask of the forward, so threads never share it."""

from dataclasses import dataclass, field
from typing import Any

import torch

from sparse_patch.call import ForwardState
from sparse_patch.errors import PatchError
from sparse_patch.integration.caches.lookup import Prompt, prompt_of
from sparse_patch.integration.names import is_hook
from sparse_patch.integration.tally import Tally
from sparse_patch.integration.transformers_internals import implementation_of

_ANEW = "the model was patched or unpatched while a forward ran; run the forward again"


@dataclass(eq=False)
class PatchMark:
    """Distinguishes one patch of a model from the next.

    Attributes:
        active: whether the model still has this patch.
        tallies: what each graph counted that is not in the counts of the layers yet.
    """

    active: bool = True
    tallies: list[Tally] = field(default_factory=list)

    def add(self, tally: Tally) -> None:
        """Keep the tally of a new graph; forget those whose graphs are gone."""
        self.settle()
        self.tallies = [*(known for known in self.tallies if known.is_alive), tally]

    def settle(self) -> None:
        """Move what graphs counted into the counts of the layers."""
        for tally in self.tallies:
            tally.settle()

    def __getstate__(self) -> dict[str, Any]:
        """The state for a copy of a patched model, which has no graphs; see `LayerState.__getstate__`."""
        return {**vars(self), "tallies": []}


@dataclass
class Forward:
    """One forward pass of a decoder.

    Attributes:
        config: the config that the masks were made with; unpatching removes the hook's name from it.
        cache: the cache of the forward; None without a cache, and before the first attention module is reached.
        prompt: the prompt that `generate` reads, if `generate` made the forward. Always None inside a compiled graph,
            which serves any prompt.
        patch: the patch that the layers run under.
        forward_state: what methods pass on from layer to layer.
        gave_way: layers of the cache that were rings when they handed over their keys, and are no longer rings.
    """

    config: Any = None
    cache: Any = None
    prompt: Prompt | None = None
    patch: PatchMark | None = None
    forward_state: ForwardState = field(default_factory=dict)
    gave_way: set[int] = field(default_factory=set)

    def join(self, patch: PatchMark) -> None:
        """Note that a patched attention module is about to run in this forward.

        Raises:
            PatchError: since the forward began, the model was unpatched, and possibly patched again.
        """
        if self.patch is patch and patch.active:
            return
        if not torch.compiler.is_compiling():
            same = patch.active and self.patch in (None, patch)
            if not same or not (self.config is None or is_hook(implementation_of(self.config))):
                raise PatchError(_ANEW)
        self.patch = patch

    def use(self, cache: Any) -> None:
        """Note that an attention module is about to run with a cache, or without one."""
        if cache is not self.cache:
            self.cache = cache
            self.prompt = None if torch.compiler.is_compiling() else prompt_of(cache)

    def check_patched(self) -> None:
        """Raise PatchError if the model was unpatched since a patched attention module ran in this forward."""
        if self.patch is not None and not self.patch.active:
            raise PatchError(_ANEW)
