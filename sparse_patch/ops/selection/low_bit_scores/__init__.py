"""Which key blocks a query tile needs, by low-bit scores against an exact reference: the selection of SALE.

Queries are cut into tiles of 64 and keys into blocks of 32, each row of the batch from its own first key. For every
query tile of every query head the key blocks fall into

- the reference region: block 0 (the sink), and the local blocks. These are the last `local_window` keys up to the end
  of the tile, extended back to the edge of a segment of 128 keys (segments count from block 1). The region is computed
  exactly, and gives each query `i` its largest logit `M_i` and `L_i = sum exp(logit - M_i)`.
- the candidates in between. Block `n` is kept if for some query `i` of the tile and key `j` of the block
  `exp(s_ij - M_i) / L_i > tau`, where `s_ij` is a logit estimated from quantised queries and keys.

Keys are smoothed first: the mean over the row's real keys is subtracted, which changes no softmax. There are two
numerics:

- `int4`, the published numerics: codes are -7 to 7. Queries `r` and `r + 8` of 16 share a scale, and the keys of a
  block with the same `(n % 8) // 2` share a scale. The mean query is subtracted as well, and its product with a key,
  in units of both scales and rounded, is added to the integer product. Means, scales, their product, the estimate and
  the limit are rounded to the model's dtype. This is for parity, not for speed.
- `int8`: codes are -127 to 127. Each query and each key block has a float32 scale. The largest product of a block is
  taken as an integer and converted once, which is fast on a Hopper GPU.

The specification leaves some points open. Here codes are computed in float32 with the stored scale, rounded half to
even. A group of zeros has scale 1. Queries that a tile does not have do not change its scales. The mean key is over all
keys of the call, so later tokens affect the codes, but no sum.

With a softcap, the logits of the reference region are those of the unsmoothed keys, capped. tanh is monotone, so the
cap is inverted for the limit instead of applied to every estimate.

Decisions are maps of bits, int32 `[B, Hq, NQ, words]`: bit `n % 32` of word `n // 32` is key block `n`; NQ as in
`BlockGrid.of(call, 64)`. Sink, local and diagonal blocks are set. Bits above the diagonal, and tiles that a row does
not have, are 0. A head whose `tau` is below 1e-5 has every bit up to the diagonal.

Backends: `reference` (float32, whole score matrices), `torch` (slices) and `triton` (two kernels). All serve float16,
bfloat16 or float32, grouped KV heads without repeating them, any positive scale, softcap, left padding per row,
`q_start > 0`, any length and strides.
"""

from torch import Tensor

from sparse_patch.call import AttentionCall
from sparse_patch.errors import UnsupportedCallError
from sparse_patch.ops import backends
from sparse_patch.ops.selection.low_bit_scores.maps import decided_pairs, tiles, unpacked
from sparse_patch.ops.selection.low_bit_scores.params import DENSE_BELOW, LowBitParams, Numerics
from sparse_patch.ops.selection.low_bit_scores.reference import decisions as in_reference
from sparse_patch.ops.selection.low_bit_scores.torch import decisions as in_torch

__all__ = [
    "DENSE_BELOW",
    "LowBitParams",
    "Numerics",
    "decided_pairs",
    "decisions",
    "tiles",
    "unpacked",
    "why_unsupported",
]


def decisions(call: AttentionCall, tau: Tensor, rule: LowBitParams, backend: str = "auto") -> Tensor:
    """The key blocks that every query tile of every head needs, as bits.

    Args:
        call: the attention call.
        tau: float32 `[Hq]` on the device of the call: the attention, relative to that of the reference region, above
            which a key keeps its block. Below 1e-5 the head is dense.
        rule: numerics and local window.
        backend: "reference", "torch", "triton", or "auto" for the fastest one that serves the call.

    Returns:
        The map, int32 `[B, Hq, NQ, words]`; see the module.

    Raises:
        UnsupportedCallError: the backend cannot serve the call; `why_unsupported` says so in advance.
    """
    if backend == "auto":
        backend = backends.fastest(call)
    elif reason := why_unsupported(call, backend):
        raise UnsupportedCallError(reason)
    if backend == "triton":
        from sparse_patch.ops.selection.low_bit_scores.triton import decisions as in_triton

        return in_triton(call, tau, rule)
    return (in_reference if backend == "reference" else in_torch)(call, tau, rule)


def why_unsupported(call: AttentionCall, backend: str) -> str | None:
    """Why a backend cannot serve a call; None if it can."""
    if call.scale <= 0:
        return f"scores: scale {call.scale} is not positive"
    return backends.why_unsupported(call, backend)
