"""Training-free sparse attention for long prompts in Hugging Face Transformers.

patch_model(model, "flexprefill.yaml")  # model.generate(...) now prefills sparsely
print(sparsity_report(model))  # what was really computed
unpatch_model(model)  # bit for bit what it was

The import is light: PyTorch, Transformers and pydantic are imported when a name that needs them is used first.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparse_patch.errors import ConfigError, PatchError, SparsePatchError, TaskError, UnsupportedCallError
from sparse_patch.version import __version__

if TYPE_CHECKING:  # the same names as in `_MODULES`, for type checkers and editors
    from sparse_patch.config import PatchConfig, load_config, packaged_configs
    from sparse_patch.integration.caches.making import growing_cache
    from sparse_patch.integration.caches.size import CacheBytes, cache_bytes
    from sparse_patch.integration.generation_cache import span_cache
    from sparse_patch.integration.patching import patch_model, patched, unpatch_model
    from sparse_patch.integration.reporting import capture_plans, reset_report, sparsity_report
    from sparse_patch.models.minicpm import load_minicpm

__all__ = [
    "CacheBytes",
    "ConfigError",
    "PatchConfig",
    "PatchError",
    "SparsePatchError",
    "TaskError",
    "UnsupportedCallError",
    "__version__",
    "cache_bytes",
    "capture_plans",
    "growing_cache",
    "load_config",
    "load_minicpm",
    "packaged_configs",
    "patch_model",
    "patched",
    "reset_report",
    "span_cache",
    "sparsity_report",
    "unpatch_model",
]

_MODULES = {  # the names that each module is imported for, on their first use
    "sparse_patch.config": ("PatchConfig", "load_config", "packaged_configs"),
    "sparse_patch.integration.caches.making": ("growing_cache",),
    "sparse_patch.integration.caches.size": ("CacheBytes", "cache_bytes"),
    "sparse_patch.integration.generation_cache": ("span_cache",),
    "sparse_patch.integration.patching": ("patch_model", "patched", "unpatch_model"),
    "sparse_patch.integration.reporting": ("capture_plans", "reset_report", "sparsity_report"),
    "sparse_patch.models.minicpm": ("load_minicpm",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """A public name on its first use (PEP 562): its module is imported, and the name kept."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
