"""The interface of attention ops: each executes one kind of plan, by several backends, with one kind of result."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.errors import UnsupportedCallError
from sparse_patch.ops.backends import DEFERS_TO_AUTO, fastest, why_unsupported
from sparse_patch.plans import SparsePlan

P = TypeVar("P", bound=SparsePlan)


class Attended(NamedTuple):
    """The result of attention.

    Attributes:
        out: the output `[B, Hq, Sq, Dv]` in the dtype of the queries.
        lse: the log-sum-exp of each query's logits, float32 `[B, Hq, Sq]`, natural logarithm; None if not asked for.
        logits: the logits of the last query, float32 `[B, Hq, capacity]` by position within the row, scaled and
            softcapped; entries at or after the row's length are undefined. None if not asked for.
    """

    out: torch.Tensor
    lse: torch.Tensor | None = None
    logits: torch.Tensor | None = None

    def with_sinks(self, sinks: torch.Tensor) -> "Attended":
        """The result of a softmax that has one more logit for each head, a logit without a value (gpt-oss).

        Such a softmax multiplies the weight of every key by `exp(lse) / (exp(lse) + exp(sink))`, so kernels need not
        know the sinks. A query with no key still gives 0.

        Args:
            sinks: the logits of the sinks, `[Hq]`.
        """
        assert self.lse is not None, "asked for"
        of_heads = sinks.float()[:, None]
        share = torch.sigmoid(self.lse - of_heads).nan_to_num(0.0)[..., None]  # no key and a sink of -inf
        return Attended((self.out * share).to(self.out.dtype), torch.logaddexp(self.lse, of_heads), self.logits)


def _fastest(call: AttentionCall, plan: SparsePlan) -> str:
    return fastest(call)


def _why(call: AttentionCall, plan: SparsePlan, backend: str) -> str | None:
    return why_unsupported(call, backend)


class AttentionOp(Generic[P]):
    """An op that executes one kind of plan.

    Attributes:
        executes: the kind of plan.
        module: gives the module of a backend, which has `attend(call, plan, return_lse) -> Attended`. The module is
            imported when it first runs, because Triton and flash-attn-4 may be missing.
        backends: the names of these modules; `reference` and `torch` serve every call.
        fastest: gives the backend that "auto" stands for; by default that of an op whose one kernel is Triton's.
        why: says why one of the other backends cannot serve a call, None if it can; by default likewise.
    """

    def __init__(  # no frozen dataclass: torch.compile (2.13) cannot trace one that has functions
        self,
        executes: type[P],
        module: Callable[[str], Any],
        backends: tuple[str, ...],
        fastest: Callable[[AttentionCall, P], str] = _fastest,
        why: Callable[[AttentionCall, P, str], str | None] = _why,
    ) -> None:
        self.executes, self.module, self.backends = executes, module, backends
        self.fastest, self.why = fastest, why

    def attend(self, call: AttentionCall, plan: P, backend: str = "auto", return_lse: bool = False) -> Attended:
        """Attention over the planned keys.

        Args:
            call: the attention call.
            plan: the keys to read; made for this call.
            backend: one of `backends`, or "auto" for the fastest one that serves the call. "flash" is "auto" for an op
                without that backend.
            return_lse: whether the result must have the LSE.

        Raises:
            UnsupportedCallError: the backend cannot serve the call; `why_unsupported` says so in advance.
        """
        if self._is_open(backend):
            backend = self.fastest(call, plan)
        elif reason := self.why_unsupported(call, plan, backend):
            raise UnsupportedCallError(reason)
        attended: Attended = self.module(backend).attend(call, plan, return_lse)
        if return_lse or attended.logits is not None:
            return attended
        return Attended(attended.out)

    def why_unsupported(self, call: AttentionCall, plan: P, backend: str) -> str | None:
        """Why a backend cannot serve a call; None if it can, as "auto" always can."""
        return None if self._is_open(backend) or backend in ("torch", "reference") else self.why(call, plan, backend)

    def _is_open(self, backend: str) -> bool:
        return backend in DEFERS_TO_AUTO and backend not in self.backends
