"""The op of every kind of plan: each folder here with an `OP` executes the kind of plan that the `OP` names."""

from importlib import import_module
from pkgutil import iter_modules

from sparse_patch.call import AttentionCall
from sparse_patch.ops import attention
from sparse_patch.ops.attention.op import Attended, AttentionOp
from sparse_patch.plans import SparsePlan


def _found() -> dict[type[SparsePlan], AttentionOp[SparsePlan]]:
    folders = [import_module(f"{attention.__name__}.{info.name}") for info in iter_modules(attention.__path__)]
    ops = [folder.OP for folder in folders if hasattr(folder, "OP")]
    return {op.executes: op for op in ops}


OPS = _found()


def attend(call: AttentionCall, plan: SparsePlan, backend: str = "auto", return_lse: bool = False) -> Attended:
    """Attention over the keys of any plan; see `AttentionOp.attend`."""
    return OPS[type(plan)].attend(call, plan, backend, return_lse)


def why_unsupported(call: AttentionCall, plan: SparsePlan, backend: str) -> str | None:
    """Why a backend cannot execute a plan; see `AttentionOp.why_unsupported`."""
    return OPS[type(plan)].why_unsupported(call, plan, backend)
