"""The names under which the hook is registered with Transformers as an attention implementation.

A name has in it which implementation the model had before: a config that carries it still says what a model built
from it computes, with nothing else at hand. Letters change their case in it (`sparse_patch:SDPA`), because Transformers
takes any name with "flash" in it for a kernel of that kind.
"""

HOOK = "sparse_patch"
ON_KERNELS = "sparse_patch_on_kernels"  # the same hook, on a model whose decode steps need no masks


def hook_name(unpatched: str | None, kind: str = HOOK) -> str:
    """The name of the hook on a model that had the implementation `unpatched`; None is Transformers' "eager"."""
    return f"{kind}:{(unpatched or 'eager').swapcase()}"


def is_hook(name: str | None) -> bool:
    """Whether an implementation's name is one of the hook's."""
    return name is not None and name.partition(":")[0] in (HOOK, ON_KERNELS)


def unpatched_name(name: str | None) -> str:
    """The implementation that a model has without a patch: what a name of the hook says, or the name itself."""
    if name is None:
        return "eager"
    return name.partition(":")[2].swapcase() if is_hook(name) else name
