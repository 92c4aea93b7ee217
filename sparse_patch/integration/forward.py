"""What the layers of one forward share. It travels with the mask of the forward, so threads never meet in it."""

from dataclasses import dataclass, field
from typing import Any

import torch

from sparse_patch.call import ForwardState
from sparse_patch.errors import PatchError
from sparse_patch.integration.caches.lookup import Prompt, prompt_of
from sparse_patch.integration.names import is_hook
from sparse_patch.integration.transformers_internals import implementation_of

_ANEW = "the model was patched or unpatched while a forward ran; run the forward again"


@dataclass(eq=False)
class PatchMark:
    """Tells one patch of a model from the next.

    Attributes:
        active: whether the model still has it.
    """

    active: bool = True


@dataclass
class Forward:
    """One forward pass of a decoder.

    Attributes:
        config: the config that its masks were made by; unpatching takes the hook's name out of it.
        cache: the cache that it uses; None without one, and before the first attention module is reached.
        prompt: what `generate` reads first, if it made the forward; never inside a compiled graph, which serves any.
        patch: the patch that its layers run under.
        forward_state: what methods pass on from layer to layer.
        gave_way: layers of the cache that were rings when they handed their keys over, and are no more.
    """

    config: Any = None
    cache: Any = None
    prompt: Prompt | None = None
    patch: PatchMark | None = None
    forward_state: ForwardState = field(default_factory=dict)
    gave_way: set[int] = field(default_factory=set)

    def join(self, patch: PatchMark) -> None:
        """An attention module with a patch is about to run in this forward.

        Raises:
            PatchError: the model was unpatched, maybe patched anew, since the forward began.
        """
        if self.patch is patch and patch.active:
            return
        if not torch.compiler.is_compiling():
            same = patch.active and self.patch in (None, patch)
            if not same or not (self.config is None or is_hook(implementation_of(self.config))):
                raise PatchError(_ANEW)
        self.patch = patch

    def use(self, cache: Any) -> None:
        """An attention module is about to run with a cache, or with none."""
        if cache is not self.cache:
            self.cache = cache
            self.prompt = None if torch.compiler.is_compiling() else prompt_of(cache)

    def check_patched(self) -> None:
        """Raise PatchError if the model was unpatched since an attention module with a patch ran in this forward."""
        if self.patch is not None and not self.patch.active:
            raise PatchError(_ANEW)
