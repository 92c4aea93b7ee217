"""Values that an object computes once."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class once(Generic[T]):
    """A property that is computed on first access and then kept: `functools.cached_property` without a lock.

    Python has that lock up to 3.11, and `torch.compile` cannot trace it. Threads that ask at the same time compute the
    value twice.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self.make, self.name = make, make.__name__
        self.__doc__ = make.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        if instance is None:
            return self  # type: ignore[return-value]
        value = self.make(instance)
        object.__setattr__(instance, self.name, value)  # hides this property from now on; dataclasses may be frozen
        return value
