"""Methods: each decides which keys a query reads, and answers with a plan. One file each; `base` is the protocol.

    from sparse_patch.methods import FlexPrefill, Quest
    patch_model(model, prefill=FlexPrefill(gamma=0.9), decode=Quest(budget=4096))

A class is the settings of a method: its fields are the fields of the YAML. For your own methods there are the bases
`PrefillMethod` (write `select`), `DecodeMethod` (write `choose`), `BudgetedMethod` (the same, with a budget of keys)
and `Method` (write `bind`), and the decorator `register_method`. A class is imported when it is used first.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names as in `_MODULES`, for type checkers and editors
    from sparse_patch.methods.a_shape import AShape
    from sparse_patch.methods.base.bound import BoundMethod, Selection
    from sparse_patch.methods.base.budget import BudgetedMethod, Count
    from sparse_patch.methods.base.registry import register_method
    from sparse_patch.methods.base.settings import DecodeMethod, Method, PrefillMethod
    from sparse_patch.methods.delta import Delta
    from sparse_patch.methods.dense import DenseMethod
    from sparse_patch.methods.duoattention import DuoAttention
    from sparse_patch.methods.flexprefill import FlexPrefill
    from sparse_patch.methods.infllmv2 import InfLLMv2
    from sparse_patch.methods.kinetics import Kinetics
    from sparse_patch.methods.lessismore import LessIsMore
    from sparse_patch.methods.minference import MInference
    from sparse_patch.methods.moa import MoA
    from sparse_patch.methods.quest import Quest
    from sparse_patch.methods.sale import Sale
    from sparse_patch.methods.spargeattn import SpargeAttn
    from sparse_patch.methods.streamingllm import StreamingLLM
    from sparse_patch.methods.tidaldecode import TidalDecode
    from sparse_patch.methods.xattention import XAttention

__all__ = [
    "AShape",
    "BoundMethod",
    "BudgetedMethod",
    "Count",
    "DecodeMethod",
    "Delta",
    "DenseMethod",
    "DuoAttention",
    "FlexPrefill",
    "InfLLMv2",
    "Kinetics",
    "LessIsMore",
    "MInference",
    "Method",
    "MoA",
    "PrefillMethod",
    "Quest",
    "Sale",
    "Selection",
    "SpargeAttn",
    "StreamingLLM",
    "TidalDecode",
    "XAttention",
    "register_method",
]

_MODULES = {  # the names of the modules whose names are not those of their classes
    "base.bound": ("BoundMethod", "Selection"),
    "base.budget": ("BudgetedMethod", "Count"),
    "base.registry": ("register_method",),
    "base.settings": ("DecodeMethod", "Method", "PrefillMethod"),
    "a_shape": ("AShape",),
    "dense": ("DenseMethod",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """A public name on its first use (PEP 562): its module is imported, and the name kept."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_MODULE_OF.get(name, name.lower())}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
