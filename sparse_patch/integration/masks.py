"""The lazy mask: describes the mask of a forward without building it (a dense mask is 16 GiB at 128k tokens)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function

from sparse_patch.call import causal_pairs
from sparse_patch.integration.forward import Forward
from sparse_patch.integration.names import unpatched_name
from sparse_patch.integration.step import Reach, Step, StepCall, running_step
from sparse_patch.integration.tensor_in_waiting import TensorInWaiting
from sparse_patch.integration.transformers_internals import (
    adds_to_causal,
    implementation_of,
    kind_of_window,
    mask_function_of,
)
from sparse_patch.ops.attention.span_ring import tokens_before
from sparse_patch.plans.once import once
from sparse_patch.report import Work

DECODE_MAX_QUERIES = 16  # speculative decoding verifies a few tokens at once, which is still decode
_ALL = slice(None)


@dataclass(frozen=True, eq=False)
class LazyMask(TensorInWaiting):
    """The arguments that Transformers hands to a mask function; the mask itself is built on demand.

    One object serves all layers of a forward. It passes through Transformers in place of a 4-D mask tensor. A model
    that computes on its mask gets the tensor that it gets without the patch (`TensorInWaiting`).
    """

    arguments: dict[str, Any]
    forward: Forward
    parent: "tuple[LazyMask, slice] | None" = None  # the mask that this one is a part of, and which query rows it has
    is_prepared: bool = False  # for a graph, see `prepare_for_a_graph`
    step: Step | None = None  # the step that the forward is, if it is one
    _built: dict[str | None, torch.Tensor | None] = field(default_factory=dict)
    _derived: dict[Any, "LazyMask"] = field(default_factory=dict)  # on other devices, of other query rows

    ndim = 4

    def tensor(self) -> torch.Tensor:
        """The mask as a tensor, for a model that computes on it: the mask of the implementation before the patch.

        Raises:
            PatchError: the model was unpatched while the forward ran.
        """
        self.forward.check_patched()
        name = unpatched_name(implementation_of(self.arguments["config"]))
        function = mask_function_of(name)
        if function is None:
            name, function = "eager", mask_function_of("eager")
        assert function is not None, "eager attention has masks"
        mask = self.build(name)
        if mask is not None:
            return mask
        key = f"{name}, never skipped"  # the implementation needs no mask here, but the model asks for one
        if key not in self._built:
            self._built[key] = function(**{**self.arguments, "allow_is_causal_skip": False})
        made = self._built[key]
        assert made is not None, "no implementation skips a mask that it was told not to skip"
        return made

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.arguments["batch_size"], 1, self.q_length, self.kv_length

    @once
    def q_length(self) -> int:
        return int(self.arguments["q_length"])

    @once
    def kv_length(self) -> int:
        """Number of keys that the cache returns; for a static cache, the buffer size."""
        return int(self.arguments["kv_length"])

    @property
    def device(self) -> torch.device:
        return torch.device(self.arguments["device"])

    @property
    def padding(self) -> torch.Tensor | None:
        """The 2-D padding mask of the batch, bool; None without one."""
        padding: torch.Tensor | None = self.arguments["attention_mask"]
        return padding

    @once
    def window(self) -> int | None:
        """Width of the window in sliding-window and chunked layers; None in full layers."""
        window: int | None = self.arguments.get("local_size")
        return window

    def __len__(self) -> int:
        return self.shape[0]

    def contiguous(self) -> "LazyMask":
        return self

    def to(self, device: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The mask on another device. Accelerate calls this before a layer that is on another device."""
        if torch.is_tensor(device):
            return self.tensor().to(device, *args, **kwargs)
        if isinstance(device, torch.dtype) or device is None or torch.device(device) == self.device:
            return self
        device = torch.device(device)
        if device not in self._derived:
            moved = {
                key: value.to(device) if torch.is_tensor(value) else value for key, value in self.arguments.items()
            }
            parent = None if self.parent is None else (self.parent[0].to(device), self.parent[1])
            self._derived[device] = LazyMask({**moved, "device": device}, self.forward, parent)
        return self._derived[device]

    def __getitem__(self, index: Any) -> Any:
        """A lazy mask for `mask[:, :, rows, :]`, which Gemma's KV-shared layers use; for any other index a tensor."""
        if not _is_of_query_rows(index):
            return self.tensor()[index]
        start, stop, _ = index[2].indices(self.q_length)
        rows = {"q_offset": self.arguments["q_offset"] + start, "q_length": max(stop - start, 0)}
        return LazyMask({**self.arguments, **rows}, self.forward, (self, slice(start, stop)))

    def build(self, implementation: str | None) -> torch.Tensor | None:
        """The mask that Transformers would have built for `implementation`. It is kept for the other layers."""
        if implementation not in self._built:
            self._built[implementation] = self._build(implementation)
        return self._built[implementation]

    def _build(self, implementation: str | None) -> torch.Tensor | None:
        function = mask_function_of(implementation)
        if function is None:
            return None
        if self.parent is None:
            return function(**self.arguments)
        whole, rows = self.parent
        mask = whole.build(implementation)
        if mask is not None:
            return mask[:, :, rows] if mask.ndim == 4 else mask
        offset = self.arguments["q_offset"]
        last_query = self.q_length == 1 and isinstance(offset, int)
        if self.q_length == whole.q_length or (
            last_query and offset + 1 == self.kv_length + self.arguments["kv_offset"]
        ):
            return None  # only causality decides what is visible
        return function(**{**self.arguments, "allow_is_causal_skip": False})

    @property
    def captured(self) -> list[StepCall] | None:
        """Where the calls of a step are noted that is being captured; None outside of that."""
        return None if self.step is None else self.step.captured

    def prepare_for_a_graph(self, implementations: Sequence[str]) -> None:
        """Compute in advance what a compiled forward asks for.

        A graph cannot read these values itself, or would tie them to the objects of this step.
        """
        for implementation in implementations if self.is_decode else ():
            self.build(implementation)
        _ = self.end_on_device, self.real_row_starts, self.tokens_before
        if not self.is_decode:
            _ = self.q_start

    @once
    def is_plain_causal(self) -> bool:
        """Whether only causality and padding decide what is visible."""
        return self.arguments["mask_function"] is causal_mask_function

    @once
    def window_in_step(self) -> str | None:
        """ "sliding" or "chunked" in a step, if only causality, padding and such a window decide what is visible."""
        return None if self.step is None else kind_of_window(self.arguments["mask_function"])

    @once
    def reach(self) -> Reach | None:
        """What the token of a step reads; None outside of steps."""
        kind = self.window_in_step
        return None if self.step is None else self.step.reach(self.window if kind else None, kind == "chunked")

    @property
    def is_decode(self) -> bool:
        """Whether the forward generates. A part of the query rows has the phase of the whole forward.

        Inside `generate`, a forward generates once the prompt has been read, whatever the number of queries: assisted
        decoding may verify many at once. Outside `generate`, a forward generates if it has few queries that follow
        tokens in a cache. The same holds for a static cache, where the number of earlier tokens is only on the device.
        """
        if self.step is not None:
            return True
        if self.parent is not None:
            return self.parent[0].is_decode
        offset, prompt = self.arguments["q_offset"], self.forward.prompt
        few = self.q_length <= DECODE_MAX_QUERIES
        if torch.is_tensor(offset):
            return few
        if prompt is None:
            return few and offset > 0
        return offset >= prompt.end and (few or prompt.verifies)

    @property
    def queries_of_prompt(self) -> int | None:
        """The number of queries that end the prompt, if candidates to verify follow them; else None.

        The first forward of assisted decoding reads the prompt and the first candidates at once.
        """
        offset, prompt = self.arguments["q_offset"], self.forward.prompt
        if prompt is None or not prompt.verifies or torch.is_tensor(offset) or self.parent is not None:
            return None
        queries = prompt.end - offset
        return queries if 0 < queries < self.q_length else None

    def parted(self, queries: int) -> "tuple[LazyMask, LazyMask]":
        """The mask of the first `queries` queries, over the keys up to them, and the mask of the others."""
        first = {"q_length": queries, "kv_length": self.q_start + queries}
        others = {"q_length": self.q_length - queries, "q_offset": self.q_start + queries}
        for part in (first, others):
            key = tuple(part.items())
            if key not in self._derived:
                self._derived[key] = LazyMask({**self.arguments, **part}, self.forward)
        return self._derived[tuple(first.items())], self._derived[tuple(others.items())]

    @once
    def q_start(self) -> int:
        """Absolute position of the first query. With a static cache this is read from the device, once per forward."""
        return int(self.arguments["q_offset"])

    @once
    def end_on_device(self) -> torch.Tensor | None:
        """Number of valid keys, int64 `[]`, if the cache is static and counts them on the device; else None."""
        if self.reach is not None:
            return self.reach.end
        offset = self.arguments["q_offset"]
        return (offset + self.q_length).reshape(()) if torch.is_tensor(offset) else None

    @property
    def fits(self) -> bool:
        """Whether the queries lie within the keys. In static decode this is assumed, without a host sync."""
        if self.is_decode and self.end_on_device is not None:
            return True
        return self.q_start + self.q_length <= self.kv_length

    @once
    def row_starts(self) -> torch.Tensor | None:
        """First key of each row that is real, in a step that is read, int64 `[B]`; None if there is no padding."""
        if self.reach is not None:
            return self.reach.starts
        return None if self.padding is None else self.padding.to(torch.uint8).argmax(-1)

    @once
    def _padding_facts(self) -> tuple[bool, bool]:
        """`(every row is padding followed by tokens, some row is padded)`; read from the device once per forward."""
        if self.step is not None or self.padding is None or self.row_starts is None:
            return True, self.row_starts is not None
        padding = self.padding[:, : self.q_start + self.q_length]
        tokens = padding.sum(-1)
        left_only = (tokens > 0) & (tokens == padding.shape[-1] - self.row_starts)
        facts = torch.stack([left_only.all(), (self.row_starts > 0).any()]).tolist()
        return facts[0], facts[1]

    @property
    def has_left_padding_only(self) -> bool:
        return self._padding_facts[0]

    @property
    def real_row_starts(self) -> torch.Tensor | None:
        """`row_starts`; None if no row is actually padded."""
        return self.row_starts if self._padding_facts[1] else None

    @once
    def tokens_before(self) -> torch.Tensor:
        """Tokens that each row had before the forward, int64 `[B]`; see `ops.attention.span_ring.tokens_before`."""
        seen = self.q_start if self.end_on_device is None else self.end_on_device - self.q_length
        return tokens_before(seen, self.real_row_starts, self.shape[0], self.device)

    @property
    def known_before(self) -> int | None:
        """The number in `tokens_before`, if no row is padded and the host knows it; None inside of a graph."""
        if torch.compiler.is_compiling() or self.end_on_device is not None or self.real_row_starts is not None:
            return None
        return self.q_start

    @property
    def alone(self) -> "LazyMask":
        """The mask of a forward with nothing before it, over only its own keys, without the tail of a static cache."""
        if self.kv_length == self.q_length:
            return self  # not kept on itself: the circle would keep the cache until garbage is collected
        if "alone" not in self._derived:
            own = {**self.arguments, "q_offset": 0, "kv_length": self.q_length}
            self._derived["alone"] = LazyMask(own, self.forward)
        return self._derived["alone"]

    @once
    def work(self) -> Work:
        """The work of a dense call of this forward; computed on the host if this needs no host sync."""
        batch, offset = self.shape[0], self.arguments["q_offset"]
        if self.step is not None:
            return self.step.work(self.window)
        starts = self.real_row_starts if self.is_prepared else self.row_starts
        if starts is None and isinstance(offset, int):
            return _work(batch, offset, self.q_length, self.window)
        same = 1 if starts is not None else batch  # rows that one start stands for
        if starts is None:
            starts = torch.zeros(1, dtype=torch.int64, device=self.device)
        end = offset + self.q_length
        causal = causal_pairs(offset, end, starts).sum()
        queries = (end - torch.maximum(starts, starts.new_zeros(()) + offset)).clamp(min=0).sum()
        attended = causal if self.window is None else torch.minimum(causal, queries * self.window)
        return Work(same * queries, same * causal, same * attended)


def _work(batch: int, q_start: int, q_length: int, window: int | None) -> Work:
    end = q_start + q_length
    causal = (end * (end + 1) - q_start * (q_start + 1)) // 2
    attended = causal
    if window is not None:
        inside = max(min(end, window) - q_start, 0)  # queries that see no more keys than a whole window has
        attended = inside * q_start + inside * (inside + 1) // 2 + (q_length - inside) * window
    return Work(batch * q_length, batch * causal, batch * attended)


def lazy_mask(**arguments: Any) -> LazyMask:
    """The mask function that is registered with Transformers. It keeps the arguments for later."""
    return _lazy_mask(arguments, ("sdpa", "eager"))


def lazy_mask_for_kernels(**arguments: Any) -> LazyMask:
    """`lazy_mask` for models whose decode steps run on our kernels: no mask is built in advance for every step."""
    return _lazy_mask(arguments, ())


def _is_of_query_rows(index: Any) -> bool:
    """Whether an index is `[:, :, rows, :]` with a slice of consecutive rows."""
    if not (isinstance(index, tuple) and len(index) == 4 and all(isinstance(part, slice) for part in index)):
        return False
    return (*index[:2], index[3]) == (_ALL, _ALL, _ALL) and index[2].step in (None, 1)


def _lazy_mask(arguments: dict[str, Any], ahead: Sequence[str]) -> LazyMask:
    """Make a lazy mask. `ahead` names the implementations whose masks a compiled step may ask for."""
    mask = arguments.get("attention_mask")
    if isinstance(mask, LazyMask):  # `generate` builds the masks of a static cache in advance
        return mask
    if arguments["q_length"] == 1 and not torch.compiler.is_compiling() and adds_to_causal(arguments["mask_function"]):
        # Tokens of an image see each other in both directions; after the last token there is nothing to see.
        arguments = {**arguments, "mask_function": causal_mask_function}
    forward = Forward(arguments.get("config"))
    if not isinstance(arguments["q_offset"], torch.Tensor):
        return LazyMask(arguments, forward)
    if (step := running_step()) is not None and arguments["q_length"] == 1:
        return LazyMask(arguments, forward, is_prepared=True, step=step)
    # With a static cache the offset is the cache's own counter, which advances before attention runs.
    is_made_outside = not torch.compiler.is_compiling()
    mask = LazyMask({**arguments, "q_offset": arguments["q_offset"].clone()}, forward, is_prepared=is_made_outside)
    if is_made_outside:
        mask.prepare_for_a_graph(ahead)
    return mask
