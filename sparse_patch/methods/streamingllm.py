"""StreamingLLM: Efficient Streaming Language Models with Attention Sinks (Xiao et al., ICLR 2024, arXiv 2309.17453).

Every head of every layer keeps the first `sink` tokens and a window of the last ones. Code: mit-han-lab/streaming-llm.

Positions are the true ones. The public code renumbers the tokens in its cache at every step, so that a text may become
longer than the positions that the model was trained on; this is not done here. The public code reads prompts densely
and forgets afterwards, as a configuration with only `decode` does. Here prompts are read by the same rule, as in the
measurements of others.
"""

from typing import Literal

from sparse_patch.methods.base.bound import BoundMethod, Spans
from sparse_patch.methods.base.settings import Tokens
from sparse_patch.methods.base.spans import REPORT_LENGTH, BoundSpans, Length, SpanMethod, clip_spans
from sparse_patch.model_shape import ModelShape


class StreamingLLM(SpanMethod):
    """A sink and a window, the same for every head.

    Attributes:
        sink: first tokens of each row that every query reads.
        window: last keys that a query reads, including its own; 1 is only its own.
    """

    summary = "first tokens and a window, in prompt and answer; what lies between is forgotten"
    paper = "StreamingLLM, ICLR 2024, arXiv 2309.17453"

    method: Literal["streamingllm"] = "streamingllm"
    sink: Tokens = 4
    window: Length = 2000

    def bind(self, shape: ModelShape) -> BoundMethod:
        """See `Method.bind`."""
        return BoundStreaming(self)


class BoundStreaming(BoundSpans):
    """The same spans for every layer and head."""

    settings: StreamingLLM

    def spans(self, layer: int, length: int, kv_heads: int) -> Spans:
        """See `BoundSpans.spans`."""
        return clip_spans([self.settings.sink] * kv_heads, [self.settings.window] * kv_heads, length)

    def role(self, layer: int) -> str:
        """What the layer keeps."""
        return f"keeps {min(self.settings.sink + self.settings.window, REPORT_LENGTH)} of {REPORT_LENGTH}"
