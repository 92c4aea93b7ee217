"""The registry: it finds every method in the folder `methods`."""

import importlib
import inspect
import pkgutil
from functools import cache

from sparse_patch.methods.base.settings import Method


@cache
def registry() -> dict[str, type[Method]]:
    """Every method by name: the subclasses of `Method` that the modules of this folder define."""
    import sparse_patch.methods as folder

    methods: dict[str, type[Method]] = {}
    for info in pkgutil.iter_modules(folder.__path__):
        module = importlib.import_module(f"{folder.__name__}.{info.name}")
        for item in vars(module).values():
            if isinstance(item, type) and issubclass(item, Method) and not inspect.isabstract(item):
                methods[item.registered_name()] = item
    return dict(sorted(methods.items()))
