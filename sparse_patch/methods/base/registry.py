"""The registry of methods: those of this package, of other packages, and classes that a user registers."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from sparse_patch.call import Phase
from sparse_patch.errors import ConfigError, reason
from sparse_patch.methods.base.settings import Method

GROUP = "sparse_patch.methods"  # of the entry points of other packages
M = TypeVar("M", bound=type[Method])

_registered: dict[str, type[Method]] = {}


def register_method(method: M) -> M:
    """Make a class usable by its name: in YAML, in dicts, and wherever this process reads a configuration.

    A decorator. A class of the same name in the same module is replaced, so that a notebook's cell can run again. A
    package that is installed registers its methods by entry points of the group `sparse_patch.methods` instead.

    Raises:
        ConfigError: it is no complete method, or its name is taken.
    """
    name = _name_of(method, f"register_method: {getattr(method, '__name__', method)}")
    place = f"register_method: {method.__name__}.method: {name!r}"
    if name in packaged_methods():
        raise ConfigError(f"{place} is a method of sparse_patch; choose another name")
    earlier = _registered.get(name, method)
    if (earlier.__module__, earlier.__qualname__) != (method.__module__, method.__qualname__):
        raise ConfigError(f"{place} is registered already, by {earlier.__module__}; choose another name")
    _registered[name] = method
    return method


def find_method(name: str) -> type[Method] | None:
    """The method of a name; None if there is none. Of other packages only the one that has the name is imported.

    Raises:
        ConfigError: the package that has the name cannot be imported, or has no method there.
    """
    found = packaged_methods().get(name) or _registered.get(name)
    if found is not None:
        return found
    named = [point for point in _entry_points() if point.name == name]
    return _loaded(named[0]) if named else None


def names_for(phase: Phase) -> list[str]:
    """The names for messages. Whether a method of another package serves the phase is not known before its import."""
    here = {**packaged_methods(), **_registered}
    others = [point.name for point in _entry_points()]
    return sorted({*(name for name, method in here.items() if phase in method.phases), *others})


def registry() -> dict[str, type[Method]]:
    """Every method by name; imports the packages that have some.

    Raises:
        ConfigError: see `find_method`.
    """
    others = {point.name: _loaded(point) for point in _entry_points()}
    return dict(sorted({**others, **_registered, **packaged_methods()}.items()))


@cache
def packaged_methods() -> dict[str, type[Method]]:
    """The methods of this package, by name: the subclasses of `Method` that the modules of `methods` define."""
    import sparse_patch.methods as folder

    modules = (
        importlib.import_module(f"{folder.__name__}.{info.name}") for info in pkgutil.iter_modules(folder.__path__)
    )
    return {method.registered_name(): method for module in modules for method in _defined_in(module)}


def _defined_in(module: Any) -> Iterator[type[Method]]:
    for item in vars(module).values():
        if isinstance(item, type) and issubclass(item, Method) and not inspect.isabstract(item):
            yield item


def _entry_points() -> list[EntryPoint]:
    """Those of other packages; one with the name of a packaged method has no effect."""
    return [point for point in entry_points(group=GROUP) if point.name not in packaged_methods()]


def _loaded(point: EntryPoint) -> type[Method]:
    place = f"{GROUP}: {point.name}: the entry point {point.value}"
    try:
        method = point.load()
    except Exception as error:
        raise ConfigError(f"{place} cannot be imported ({reason(error)}); mend or uninstall its package") from error
    if (name := _name_of(method, place)) != point.name:
        raise ConfigError(f"{place} is the method {name!r}; give both the same name")
    return method


def _name_of(method: Any, place: str) -> str:
    """The name of a method's class.

    Raises:
        ConfigError: it is no complete method.
    """
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise ConfigError(f"{place}: expected a subclass of PrefillMethod, DecodeMethod or Method")
    if missing := sorted(getattr(method, "__abstractmethods__", ())):
        raise ConfigError(f"{place}: has no {', '.join(missing)}; write it")
    if not getattr(method, "phases", ()):
        raise ConfigError(f'{place}: has no phases; set phases = ("prefill",), ("decode",) or both')
    name = method.model_fields["method"].default
    if not isinstance(name, str):
        raise ConfigError(f'{place}: has no name; add method: Literal["myname"] = "myname"')
    return name
