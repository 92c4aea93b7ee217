"""The settings of a method: a pydantic model whose fields are the fields of its YAML.

A method is one file in `methods/`. The name of the file, of the YAML in `configs/` and of the `method:` value are the
same. `settings.bind(shape)` gives what plans, see `methods.base.bound`.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparse_patch.call import AttentionCall, Phase
from sparse_patch.errors import ConfigError
from sparse_patch.files.reading import MOST
from sparse_patch.methods.base.bound import BoundDecode, BoundMethod, BoundPrefill, Selection
from sparse_patch.methods.base.problems import problem_of
from sparse_patch.model_shape import LayerIndex, ModelShape, layer_numbers
from sparse_patch.plans import BlockGrid, BlockPlan, Dense, PagePlan

Tokens = Annotated[int, Field(ge=0, le=MOST)]


class Excluded(BaseModel):
    """Every layer but these."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    exclude: list[LayerIndex]


class Method(BaseModel, ABC):
    """The settings of a sparse attention method.

    Attributes:
        phases: what the method is for.
        summary: what it does, in one line, for lists of methods.
        paper: where it was published.
        files: the fields that name files. A relative path counts from the folder of the YAML that has it.
        forms: what a field may be, for messages, if pydantic does not say it well.
        renamed: earlier names of fields, and what they are called now.
        method: the registered name.
        layers: which layers use it: "all", a list of indices, or `{exclude: [...]}`. The others stay dense.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    phases: ClassVar[tuple[Phase, ...]]
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    files: ClassVar[tuple[str, ...]] = ()
    forms: ClassVar[Mapping[str, str]] = {"layers": '"all", a list of layer numbers or {exclude: [numbers]}'}
    renamed: ClassVar[Mapping[str, str]] = {}

    method: str
    layers: Literal["all"] | list[LayerIndex] | Excluded = "all"

    def __init__(self, /, **settings: Any) -> None:
        """Raise FieldError, in one line, if a setting is not valid."""
        try:
            super().__init__(**settings)
        except ValidationError as error:
            problem = problem_of(error, type(self).model_fields, self.forms, self.renamed)
            raise problem.at(type(self).__name__) from None

    @abstractmethod
    def bind(self, shape: ModelShape) -> BoundMethod:
        """The method on a model. Files that the settings name are read here.

        Which of a layer's heads a process has under tensor parallelism comes with each call (`AttentionCall.shard`),
        because the layers of one model may be split differently.

        Raises:
            FieldError: the settings do not fit the model.
            ConfigError: a file that the settings name cannot be read, or is not valid.
        """

    def artefact(self) -> Any:
        """What the file of `calibration` holds, read now; None without one, and if it can only be read for a model.

        Raises:
            ConfigError: the file cannot be read, is not valid, or was made with other settings.
        """
        return None

    def layers_of(self, num_layers: int) -> set[int]:
        """Indices of the layers that use the method, in a model with `num_layers` layers.

        Raises:
            FieldError: the model does not have one of them.
        """
        if self.layers == "all":
            return set(range(num_layers))
        if isinstance(self.layers, Excluded):
            return set(range(num_layers)) - layer_numbers("layers", self.layers.exclude, num_layers)
        return layer_numbers("layers", self.layers, num_layers)

    def digests(self) -> dict[str, str]:
        """The SHA-256 of each file that the settings name, by field: a file that changed is another setting.

        Raises:
            ConfigError: a file is not there any more.
        """
        paths = {field: getattr(self, field) for field in self.files if getattr(self, field) is not None}
        try:
            return {field: hashlib.sha256(Path(path).read_bytes()).hexdigest() for field, path in paths.items()}
        except OSError as error:
            raise ConfigError(f"{self.method}: {error.filename}: cannot be read: {error.strerror}") from None

    @classmethod
    def registered_name(cls) -> str:
        """The value of `method:` in a YAML file."""
        return str(cls.model_fields["method"].default)


class PrefillMethod(Method):
    """A method for prefill that selects blocks of keys for blocks of queries: write `select`.

    Attributes:
        min_length: rows of fewer tokens are computed densely: below some length selection costs more than it saves.
        block_size: side of a block in tokens: 16, 32, 64 or 128.
    """

    phases = ("prefill",)

    min_length: Tokens = 4096
    block_size: Literal[16, 32, 64, 128] = 128

    def bind(self, shape: ModelShape) -> BoundMethod:
        """See `Method.bind`."""
        return BoundPrefill(self)

    def why_dense(self, call: AttentionCall) -> Dense | None:
        """The reason why a whole call is dense; None if it is not. Every prefill method is dense for short prompts."""
        return self.short if call.kv_length < self.min_length else None

    @property
    def short(self) -> Dense:
        """The answer to calls of fewer than `min_length` tokens."""
        return Dense(f"shorter than min_length {self.min_length}")

    def dense_tokens(self, call: AttentionCall) -> int:
        """Rows of a batch with at most this many tokens are dense, as they are without the batch."""
        return self.min_length - 1

    @abstractmethod
    def select(self, call: AttentionCall, grid: BlockGrid) -> Selection | BlockPlan:
        """Select the key blocks that each query block of each head reads, without a host sync.

        The diagonal block of every query block must be selected. Short rows of a batch are added afterwards.

        Args:
            call: a call with more than `dense_tokens` keys.
            grid: its blocks of `block_size`; each row of the batch counts from its own first token.

        Returns:
            A `Selection`; or the plan itself, from a kernel that writes its lists, short rows included.
        """


class DecodeMethod(Method):
    """A method for decode that chooses pages of keys for each token: write `choose`.

    Attributes:
        keeps_state: whether `statistics` maintains tensors in `call.kv_state`, which lives with the cache.
        min_length: caches of fewer tokens are read densely. For a static cache the buffer size is what counts, because
            only the device knows how much of it is filled.
    """

    phases: ClassVar[tuple[Phase, ...]] = ("decode",)
    keeps_state: ClassVar[bool] = False

    min_length: Tokens = 4096

    @property
    def correct_every(self) -> int | None:
        """Tokens after which what was decoded sparsely is computed once more, densely; None for never."""
        return None

    def bind(self, shape: ModelShape) -> BoundMethod:
        """See `Method.bind`."""
        return BoundDecode(self)

    def why_dense(self, call: AttentionCall) -> Dense | None:
        """The reason why a call is dense; None if it is not. Every decode method is dense for short caches."""
        if self.is_short(call):
            return Dense(f"shorter than min_length {self.min_length}")
        return None

    def is_short(self, call: AttentionCall) -> bool:
        """Whether the cache has fewer than `min_length` tokens."""
        return call.decisive_length < self.min_length

    def statistics(self, call: AttentionCall) -> Any:
        """What `choose` compares queries with. A method that keeps it from step to step brings it up to date here.

        With `keeps_state` this is asked of calls of prefill too, before the call is planned, unless the cache is short.
        So a state may lack any number of the first tokens, and is then made of all keys.
        """
        return None

    @abstractmethod
    def choose(self, call: AttentionCall, statistics: Any) -> PagePlan:
        """Choose the pages that each head reads, without a host sync.

        Args:
            call: a call of one query.
            statistics: what the method of this name gave.
        """
