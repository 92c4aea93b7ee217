"""Which backends this machine has, for ops that choose by the device of their tensors alone."""

from importlib.util import find_spec

from torch import Tensor

_TRITON = find_spec("triton") is not None


def runs_triton(x: Tensor) -> bool:
    """Whether the Triton kernels serve tensors like this one."""
    return x.is_cuda and _TRITON
