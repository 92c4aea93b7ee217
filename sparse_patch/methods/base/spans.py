"""What methods of spans share: each KV head reads the first tokens of a row and a window of its last ones.

Which ones is known before a token is: nothing looks at queries or keys. Therefore what a head reads no more can be
forgotten, and where a layer decodes with such a method, `generate` keeps its keys in a ring that has room for no more
(`sparse_patch.rings.RingLayer`). With a cache that keeps everything the answers are the same.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field, PrivateAttr
from typing_extensions import Self

from sparse_patch.artefacts.head_schedules import MAKE_ONE, HeadSchedules
from sparse_patch.call import PHASES, AttentionCall
from sparse_patch.files.reading import MOST
from sparse_patch.methods.base.protocol import Method
from sparse_patch.model_shape import ModelShape
from sparse_patch.plans import Dense, GrowingWindow, Plan, SpanPlan, Window
from sparse_patch.tensor_parallel import HeadShard

Spans = tuple[tuple[int, ...], tuple[Window, ...]]  # sinks and windows, see `SpanPlan`
Length = Annotated[int, Field(gt=0, le=MOST)]
REPORT_LENGTH = 16384  # tokens at which a density is named where none are given


class SpanMethod(Method):
    """A method that knows its spans beforehand; for prefill, decode or both."""

    phases = PHASES

    @abstractmethod
    def spans(self, layer: int, length: int, kv_heads: int) -> Spans:
        """Sink and window of each KV head of a layer, of rows that become so long; the host's numbers.

        Args:
            layer: the layer.
            length: tokens of prompt and answer together.
            kv_heads: KV heads of the layer.

        Returns:
            Sinks and windows; a window is None where the span is no shorter than `length`.

        Raises:
            ValueError: the method knows other KV heads.
        """

    def spans_of(self, shard: HeadShard, layer: int, length: int, kv_heads: int) -> Spans:
        """`spans` of the `kv_heads` KV heads of a layer that a process has."""
        sinks, windows = self.spans(layer, length, kv_heads * shard.size)
        return shard.part(sinks), shard.part(windows)

    def reads_prompts(self) -> bool:
        """Whether prompts are read by the spans, too; else they are dense."""
        return True

    def total_length(self, call: AttentionCall) -> int:
        """Tokens of prompt and answer together as far as known, else those of the call's keys."""
        return call.max_length or call.kv_length

    def plan(self, call: AttentionCall) -> Plan:
        """The spans on a call; see `Method.plan`."""
        try:
            if call.phase == "prefill" and not self.reads_prompts():
                return Dense("the plan has prompts read densely")
            spans = self.spans_of(call.shard, call.layer, self.total_length(call), call.k.shape[1])
        except ValueError as error:
            return Dense(str(error))
        if all(window is None or covers_row(sink, window, call.kv_length) for sink, window in zip(*spans, strict=True)):
            return Dense("no longer than the spans")
        return SpanPlan.of(call, *spans)


class ScheduledMethod(SpanMethod):
    """A method whose spans come from a plan file.

    Attributes:
        calibration: the file. A relative path counts from the folder of the YAML file that names it.
    """

    files = ("calibration",)

    calibration: str | None = None
    # Of what `for_model` returns, in its `__dict__`: torch.compile cannot trace the private attributes of pydantic.
    _schedules: ClassVar[HeadSchedules | None] = None
    _remark: str = PrivateAttr(default="")

    @abstractmethod
    def read(self, path: str, shape: ModelShape) -> tuple[HeadSchedules, str]:
        """The plan of the file for a model, and what reading it made of it; ValueError as in `head_schedules`."""

    def for_model(self, shape: ModelShape) -> Self:
        """The method with the plan read; see `Method.for_model`."""
        if self.calibration is None:
            raise ValueError(f"calibration: {self.method} needs head schedules for this model; {MAKE_ONE}")
        rules, note = self.read(self.calibration, shape)
        resolved = self.model_copy()
        vars(resolved)["_schedules"] = rules
        resolved._remark = self._density_remark(
            rules, sorted(self.layers_of(shape.num_layers) - shape.local_layers), note
        )
        return resolved

    @property
    def rules(self) -> HeadSchedules:
        """The plan.

        Raises:
            ValueError: it was not read, because `for_model` was not asked.
        """
        if self._schedules is None:
            raise ValueError("the plan is one of a model, and there is none here")
        return self._schedules

    def spans(self, layer: int, length: int, kv_heads: int) -> Spans:
        """See `SpanMethod.spans`."""
        sinks, windows = self.rules.spans(layer, length)
        if len(sinks) != kv_heads:
            raise ValueError(f"the plan has {len(sinks)} KV heads a layer and the call {kv_heads}")
        return within(sinks, windows, length)

    def reads_prompts(self) -> bool:
        return self.rules.prefill == "sparse"

    def role(self, layer: int) -> str:
        """What the heads of a layer keep at one length."""
        kept = [min(tokens, REPORT_LENGTH) for tokens in self.rules.kept(layer, REPORT_LENGTH)]
        return f"keeps {'-'.join(map(str, sorted({min(kept), max(kept)})))} of {REPORT_LENGTH}"

    def remark(self) -> str:
        """The share of the keys that the plan keeps; see `Method.remark`."""
        return self._remark

    def _density_remark(self, rules: HeadSchedules, layers: Sequence[int], note: str) -> str:
        if not layers:
            return note
        density = (
            f"{self.method}: keeps {rules.density(REPORT_LENGTH, layers):.2f} of the keys at {REPORT_LENGTH} tokens"
        )
        return f"{density}; {note}" if note else density


def within(sinks: Sequence[int], windows: Sequence[int | GrowingWindow], length: int) -> Spans:
    """Spans for rows of a length: without an end where they are no shorter."""
    ends = zip(sinks, windows, strict=True)
    return tuple(sinks), tuple(None if covers_row(sink, window, length) else window for sink, window in ends)


def covers_row(sink: int, window: int | GrowingWindow, length: int) -> bool:
    """Whether every query of a row reads all keys before it: a window that does at the row's end does before it."""
    return sink + (window.at(length - 1) if isinstance(window, GrowingWindow) else window) >= length
