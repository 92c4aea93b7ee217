"""What methods with spans share: each KV head reads the first tokens of a row and a window of its last ones.

The spans are known before the tokens are: they depend on no query or key. Therefore a cache can forget what a head no
longer reads. If a layer decodes with such a method, `generate` keeps its keys in a ring that has room only for the
spans (`integration.caches.rings`). A cache that keeps everything gives the same answers.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from sparse_patch.artefacts.head_schedules import MAKE_ONE, HeadSchedules
from sparse_patch.call import PHASES, AttentionCall
from sparse_patch.errors import FieldError
from sparse_patch.files.reading import MOST
from sparse_patch.methods.base.bound import BoundMethod, Spans
from sparse_patch.methods.base.settings import Method
from sparse_patch.model_shape import ModelShape
from sparse_patch.plans import Dense, GrowingWindow, Plan, SpanPlan
from sparse_patch.tensor_parallel import HeadShard

Length = Annotated[int, Field(gt=0, le=MOST)]
REPORT_LENGTH = 16384  # length in tokens for which a report says what a head keeps


class SpanMethod(Method):
    """A method that knows its spans in advance; for prefill, decode or both."""

    phases = PHASES

    def total_length(self, call: AttentionCall) -> int:
        """Tokens of prompt and answer together if known, else the number of keys in the call."""
        return call.max_length or call.kv_length


class BoundSpans(BoundMethod):
    """Spans on a model: write `spans`."""

    settings: SpanMethod

    def __init__(self, settings: SpanMethod) -> None:
        self.settings, self.retention = settings, self

    @abstractmethod
    def spans(self, layer: int, length: int, kv_heads: int) -> Spans:
        """Sink and window of each KV head of a layer; see `Retention.spans_of`.

        Args:
            layer: the layer.
            length: tokens of prompt and answer together.
            kv_heads: KV heads of the layer, including those of other processes.

        Raises:
            ValueError: the method has spans for another number of KV heads.
        """

    def spans_of(self, shard: HeadShard, layer: int, length: int, kv_heads: int) -> Spans:
        """See `Retention.spans_of`."""
        sinks, windows = self.spans(layer, length, kv_heads * shard.size)
        return shard.part(sinks), shard.part(windows)

    @property
    def reads_prompts(self) -> bool:
        """Whether prompts are also read by the spans; else they are dense."""
        return True

    def why_dense(self, call: AttentionCall) -> Dense | None:
        """See `BoundMethod.why_dense`."""
        spans = self._spans_at(call)
        return spans if isinstance(spans, Dense) else None

    def plan(self, call: AttentionCall) -> Plan:
        """Apply the spans to a call; see `BoundMethod.plan`."""
        spans = self._spans_at(call)
        return spans if isinstance(spans, Dense) else SpanPlan.of(call, *spans)

    def _spans_at(self, call: AttentionCall) -> Spans | Dense:
        """The spans of a call; or why it is dense."""
        if call.phase == "prefill" and not self.reads_prompts:
            return Dense("the head schedules have prompts read densely")
        try:
            spans = self.spans_of(call.shard, call.layer, self.settings.total_length(call), call.k.shape[1])
        except ValueError as error:
            return Dense(str(error))
        length = call.decisive_length
        if all(window is None or covers_row(sink, window, length) for sink, window in zip(*spans, strict=True)):
            return Dense("no longer than the spans")
        return spans


class ScheduledMethod(SpanMethod):
    """A method whose spans come from a file of head schedules.

    Attributes:
        calibration: the file. A relative path counts from the folder of the YAML file that names it.
    """

    files = ("calibration",)

    calibration: str | None = None

    @abstractmethod
    def read(self, path: str, shape: ModelShape) -> tuple[HeadSchedules, str]:
        """Read head schedules for a model from the file, with a note about how the file was read.

        Raises:
            ConfigError: the file cannot be read, or was made for another model.
        """

    def bind(self, shape: ModelShape) -> BoundMethod:
        """See `Method.bind`."""
        if self.calibration is None:
            raise FieldError("calibration", f"{self.method} needs head schedules for this model", MAKE_ONE)
        schedules, note = self.read(self.calibration, shape)
        return BoundSchedules(self, schedules, note, sorted(self.layers_of(shape.num_layers) - shape.local_layers))


class BoundSchedules(BoundSpans):
    """Spans by head schedules.

    Attributes:
        schedules: the head schedules of every layer.
        note: how the file was read.
        layers: the layers that use the method.
    """

    def __init__(self, settings: SpanMethod, schedules: HeadSchedules, note: str, layers: Sequence[int]) -> None:
        super().__init__(settings)
        self.schedules, self.note, self.layers = schedules, note, layers

    def spans(self, layer: int, length: int, kv_heads: int) -> Spans:
        """See `BoundSpans.spans`."""
        sinks, windows = self.schedules.spans(layer, length)
        if len(sinks) != kv_heads:
            raise ValueError(f"the head schedules have {len(sinks)} KV heads a layer and the call {kv_heads}")
        return clip_spans(sinks, windows, length)

    @property
    def reads_prompts(self) -> bool:
        """See `BoundSpans.reads_prompts`."""
        return self.schedules.prefill == "sparse"

    def role(self, layer: int) -> str:
        """What the heads of a layer keep at `REPORT_LENGTH`."""
        kept = [min(tokens, REPORT_LENGTH) for tokens in self.schedules.kept(layer, REPORT_LENGTH)]
        return f"keeps {'-'.join(map(str, sorted({min(kept), max(kept)})))} of {REPORT_LENGTH}"

    def remark(self) -> str:
        """The share of the keys that the head schedules keep; see `BoundMethod.remark`."""
        if not self.layers:
            return self.note
        share = self.schedules.density(REPORT_LENGTH, self.layers)
        density = f"{self.settings.method}: keeps {share:.2f} of the keys at {REPORT_LENGTH} tokens"
        return f"{density}; {self.note}" if self.note else density


def clip_spans(sinks: Sequence[int], windows: Sequence[int | GrowingWindow], length: int) -> Spans:
    """The spans for rows of `length` tokens. A window that covers the whole row becomes None ("everything")."""
    ends = zip(sinks, windows, strict=True)
    return tuple(sinks), tuple(None if covers_row(sink, window, length) else window for sink, window in ends)


def covers_row(sink: int, window: int | GrowingWindow, length: int) -> bool:
    """Whether every query of a row reads all keys before it. If the last query does, all of them do."""
    return sink + (window.at(length - 1) if isinstance(window, GrowingWindow) else window) >= length
