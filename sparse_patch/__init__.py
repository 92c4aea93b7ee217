"""Training-free sparse attention for long prompts in Hugging Face Transformers.

patch_model(model, "flexprefill.yaml")  # model.generate(...) now prefills sparsely
print(sparsity_report(model))  # what was really computed
unpatch_model(model)  # bit for bit what it was
"""

from sparse_patch.caches import CacheBytes, cache_bytes, growing_cache
from sparse_patch.config import PatchConfig, load_config, packaged_configs
from sparse_patch.errors import ConfigError, PatchError, SparsePatchError, TaskError, UnsupportedCallError
from sparse_patch.minicpm import load_minicpm
from sparse_patch.patching import (
    capture_plans,
    patch_model,
    patched,
    reset_report,
    span_cache,
    sparsity_report,
    unpatch_model,
)
from sparse_patch.version import __version__

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
