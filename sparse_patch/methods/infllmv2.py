"""InfLLM-V2: Dense-Sparse Switchable Attention for Seamless Short-to-Long Adaptation (2025), of MiniCPM4 and 4.1.

Every token reads the first blocks of 64 keys, a window of blocks, and the blocks whose compressed keys it attends to
most. The query heads of a KV head choose together. Decode makes the same choice, from mean keys that the cache keeps up
to date. arXiv 2509.24663; code: OpenBMB/infllmv2_cuda_impl and the modelling code of MiniCPM4. The algorithm in plain
PyTorch: `ops/selection/compressed_keys/torch.py`.

A checkpoint that was trained for the method has its settings in `sparse_config`. A setting that the configuration
leaves null is taken from there, else from the published settings; this works on any model.

As in the code, a token reads `topk + window_size / 64` blocks in all. The first blocks, its own block and
`window_size / 64` blocks before its own are always among them, so 62 of 96 are chosen. This implementation differs from
the code in the following:

- Within `min_length` (the code's `dense_len`) everything is read. The code compares with the length of the whole call,
  so the first tokens are sparse in a long prompt and dense in a short one. Here a token reads everything if it is one
  of the first `min_length` tokens of its row, in whole blocks. So a prompt gives the same result at once, in chunks or
  token by token (the code does not serve chunks), and no token reads less than in the code.
- Groups of any size choose and attend as they are. The code repeats queries to 16 heads and averages the outputs.
- A token sees a compressed key if its window ends before or at the token. If the length is 15 modulo 16, the code
  leaves out one more.
- A compressed key is made of means of 16 keys, in the precision of the keys. The code averages 32 or 128 keys at once.
- Left padding, softcap and any scale are served; the code unpads.

`use_nope` (a choice by keys without RoPE) is refused, because attention does not get such keys.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from sparse_patch.call import PHASES, AttentionCall, Slot
from sparse_patch.errors import FieldError, short
from sparse_patch.files.reading import MOST
from sparse_patch.methods.base.bound import BoundMethod
from sparse_patch.methods.base.settings import Method, Tokens
from sparse_patch.model_shape import ModelShape
from sparse_patch.ops.selection.compressed_keys import BLOCK, STRIDE, CompressedKeysParams, block_scores, choose_blocks
from sparse_patch.ops.selection.page_statistics import page_means
from sparse_patch.ops.selection.top_pages import top_pages
from sparse_patch.plans import Dense, PagePlan, Plan

Number = Annotated[int, Field(ge=0, le=MOST)]
_PUBLISHED = {"topk": 64, "init_blocks": 1, "window_size": 2048, "min_length": 8192}
_THEIR_NAMES = {"min_length": "dense_len"}  # settings with another name in a `sparse_config`
_ONLY = {"kernel_size": 2 * STRIDE, "kernel_stride": STRIDE, "block_size": BLOCK, "use_nope": False}  # what is served


class InfLLMv2(Method):
    """Blocks by compressed keys, for each token and KV head, in prefill and decode.

    A setting that is None is taken from the checkpoint's `sparse_config`, or else is the published one.

    Attributes:
        topk: blocks that a token reads in addition to the window before its own block: the first ones, its own and
            those that it chooses. Published: 64.
        init_blocks: number of first blocks of 64 tokens that are always read. Published: 1.
        window_size: tokens before a token's own block that are always read; a multiple of 64. Published: 2048.
        min_length: `dense_len`: first tokens of a row that read everything before them, rounded up to blocks of 64. In
            decode the longest row of a batch is what counts; for a static cache, the buffer size. Published: 8192.
    """

    phases = PHASES
    summary = "blocks by compressed keys, the first and the last, for each token; MiniCPM4's own"
    paper = "InfLLM-V2, 2025, arXiv 2509.24663"

    method: Literal["infllmv2"] = "infllmv2"
    topk: Number | None = None
    init_blocks: Number | None = None
    window_size: Annotated[int, Field(ge=BLOCK, le=MOST, multiple_of=BLOCK)] | None = None
    min_length: Tokens | None = None

    @model_validator(mode="after")
    def _leaves_a_choice(self) -> Self:
        self._check_topk()
        return self

    def _check_topk(self) -> None:
        topk, init_blocks = self._number("topk"), self._number("init_blocks")
        if topk < init_blocks + 2:
            raise FieldError(
                "topk",
                f"{topk} leaves no block to choose beside the {init_blocks} first ones and a token's own",
                f"take {init_blocks + 2} or more",
            )

    def bind(self, shape: ModelShape) -> BoundMethod:
        """Bind, with settings that are None taken from the checkpoint or from `_PUBLISHED`; see `Method.bind`."""
        theirs = shape.sparse_config or {}
        if not isinstance(theirs, Mapping):
            raise FieldError(
                "method", f"expected a sparse_config of names and values in config.json, got {short(theirs)}"
            )
        for key, value in _ONLY.items():
            if theirs.get(key, value) != value:
                raise FieldError(
                    "method",
                    f"the checkpoint's sparse_config has {key} {short(theirs[key])}, and infllmv2 serves only {value}",
                    "take another method, or sparse_config out of config.json",
                )
        missing = [field for field in _PUBLISHED if getattr(self, field) is None]
        resolved = self.model_copy(update={field: _setting(field, theirs) for field in missing})
        resolved._check_topk()
        return BoundInfLLM(resolved)

    def _number(self, field: str) -> int:
        value = getattr(self, field)
        return int(_PUBLISHED[field] if value is None else value)


class BoundInfLLM(BoundMethod):
    """InfLLM-V2 on a model.

    Attributes:
        settings: the settings, none of them None.
        min_length: first tokens of a row that read everything before them.
        params: how many blocks a token reads.
        most_blocks: maximum number of blocks that a token reads if it does not read everything.
    """

    _MEANS: Slot[torch.Tensor] = Slot("mean keys of InfLLM-V2")

    keeps_state = True
    settings: InfLLMv2

    def __init__(self, settings: InfLLMv2) -> None:
        topk, init_blocks, window_size, self.min_length = (settings._number(field) for field in _PUBLISHED)
        self.settings, self.most_blocks = settings, topk + window_size // BLOCK
        self.params = CompressedKeysParams(
            init_blocks=init_blocks,
            local_blocks=window_size // BLOCK,
            dense_blocks=-(-self.min_length // BLOCK),
            chosen=topk - init_blocks - 1,
        )

    def remark(self) -> str:
        """The numbers that follow from the settings, whatever their source; see `BoundMethod.remark`."""
        tokens = self.params.dense_blocks * BLOCK
        return (
            f"{self.settings.method}: a token reads {self.most_blocks} blocks of {BLOCK} keys and chooses "
            f"{self.params.chosen} of them; "
            f"{f'the first {tokens} tokens read everything' if tokens else 'from the first token on'}"
        )

    def why_dense(self, call: AttentionCall) -> Dense | None:
        """Short calls, decode of several queries at a time, and calls in which every token reads every block."""
        if self._is_short(call):
            return Dense(f"within the first min_length {self.min_length} tokens")
        if call.phase == "decode" and call.q.shape[2] > 1:
            return Dense("more than one query")
        if call.decisive_length <= self.most_blocks * BLOCK:
            return Dense(f"no more than the {self.most_blocks} blocks that a token reads")
        return None

    def remember(self, call: AttentionCall) -> None:
        """Keep the mean keys up to date; see `BoundMethod.remember`."""
        if call.kv_state is not None and (call.length is None or not self._is_short(call)):
            self._MEANS.put(call.forward_state, page_means(call, STRIDE), call.layer)

    def _is_short(self, call: AttentionCall) -> bool:
        return call.decisive_length <= self.params.dense_blocks * BLOCK

    def plan(self, call: AttentionCall) -> Plan:
        """Choose blocks for every token of a prompt, or for the decoded token; see `BoundMethod.plan`."""
        means = self._MEANS.pop(call.forward_state, call.layer)
        if dense := self.why_dense(call):
            return dense
        if means is None:  # if there is a state, it belongs to another method
            means = page_means(replace(call, kv_state=None), STRIDE)
        return choose_blocks(call, means, self.params) if call.phase == "prefill" else self._pages(call, means)

    def _pages(self, call: AttentionCall, means: torch.Tensor) -> PagePlan:
        """The blocks of the last query, as pages; `means` as for `block_scores`."""
        scores = block_scores(call, means, self.params)
        return PagePlan.of(call, *top_pages(scores, call.lengths(), self.most_blocks, BLOCK), BLOCK)


def _setting(field: str, theirs: Mapping[str, Any]) -> int:
    """A setting of a checkpoint's `sparse_config`, or the published one if `sparse_config` does not have it.

    Raises:
        FieldError: the value in `sparse_config` is not a valid setting.
    """
    key = _THEIR_NAMES.get(field, field)
    value = theirs.get(key, _PUBLISHED[field])
    if type(value) is not int or value > MOST or (field == "window_size" and (value < BLOCK or value % BLOCK)):
        expected = f"a multiple of {BLOCK}" if field == "window_size" else f"a whole number, at most {MOST}"
        raise FieldError(
            field,
            f"expected {expected}, and the checkpoint's sparse_config has {key} {short(value)}",
            f"set {field} in the configuration",
        )
    return max(value, 0)  # a dense_len of -1 is 0: sparse from the first token on
