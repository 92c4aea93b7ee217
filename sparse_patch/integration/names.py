"""The names under which the hook is registered with Transformers as an attention implementation.

A name contains the implementation that the model had before. So a config with such a name still says what a model built
from it computes, without further information. The name swaps the case of letters (`sparse_patch:SDPA`), because
Transformers takes any name with "flash" in it for a flash-attention kernel.
"""

HOOK = "sparse_patch"
ON_KERNELS = "sparse_patch_on_kernels"  # the same hook, on a model whose decode steps need no masks


def hook_name(unpatched: str | None, kind: str = HOOK) -> str:
    """The name of the hook on a model that had the implementation `unpatched`; None means "eager"."""
    return f"{kind}:{(unpatched or 'eager').swapcase()}"


def is_hook(name: str | None) -> bool:
    """Whether an implementation's name is a name of the hook."""
    return name is not None and name.partition(":")[0] in (HOOK, ON_KERNELS)


def unpatched_name(name: str | None) -> str:
    """The implementation that a model has without a patch: the one in a name of the hook, or else the name itself."""
    if name is None:
        return "eager"
    return name.partition(":")[2].swapcase() if is_hook(name) else name
