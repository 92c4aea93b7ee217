"""A method on a small model, for tests that ask it themselves."""

from method_table import SMALL_MODEL

from sparse_patch.methods.base.bound import BoundMethod
from sparse_patch.methods.base.settings import Method
from sparse_patch.model_shape import ModelShape


def bound(method: Method | BoundMethod, shape: ModelShape = SMALL_MODEL) -> BoundMethod:
    """The method as the hook asks it; one that is bound already stays as it is."""
    return method if isinstance(method, BoundMethod) else method.bind(shape)
