"""What TidalDecode, LessIsMore and DELTA share: a few layers choose what the others read.

A full layer reads everything. A selecting layer also reads everything, and chooses a list of keys by its own attention.
Any other layer is sparse: it reads the list of the nearest selecting layer before it, in the same forward. Layers
without full attention (sliding windows and the like) stay as the model has them.

Which layer does what depends on the model. It comes from `roles` if that is set, else from the file of `calibration`,
else from a published choice for the model's shape.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch

from sparse_patch.artefacts.base import check_shape, place_of
from sparse_patch.artefacts.layer_roles import MAKE_ONE, Calibration, Roles, read_calibration
from sparse_patch.call import AttentionCall, Slot
from sparse_patch.errors import FieldError
from sparse_patch.methods.base.bound import BoundMethod
from sparse_patch.methods.base.budget import BudgetedMethod
from sparse_patch.model_shape import ModelShape
from sparse_patch.plans import Dense, PagePlan, Plan


class Preset(NamedTuple):
    """A published choice of layers.

    Attributes:
        model: name of the model.
        shape: any model of this shape gets the choice.
        layers: the choice.
        source: who published the choice.
    """

    model: str
    shape: ModelShape
    layers: Roles
    source: str


class LastLogits(NamedTuple):
    """What a selecting layer chooses by, for the last query; see `BoundMethod.select`.

    Attributes:
        logits: float32 `[B, Hq, capacity]`.
        lse: float32 `[B, Hq]`.
    """

    logits: torch.Tensor
    lse: torch.Tensor


class LayeredMethod(BudgetedMethod):
    """A method with full, selecting and sparse layers.

    Attributes:
        presets: published choices of layers.
        roles: which layers do what; see `Roles`. None to take it from `calibration` or from a preset.
        calibration: YAML file that `sparse-patch calibrate layers` wrote, used if `roles` is None. A relative path
            counts from the folder of the YAML file that names it.
    """

    files = ("calibration",)
    forms: ClassVar[Mapping[str, str]] = {
        "layers": f"{BudgetedMethod.forms['layers']}; which of them choose is set by roles",
        "roles": "{full: [numbers], select: [numbers]} or null",
    }
    presets: ClassVar[tuple[Preset, ...]] = ()

    roles: Roles | None = None
    calibration: str | None = None

    def artefact(self) -> Calibration | None:
        """See `Method.artefact`."""
        return None if self.calibration is None else read_calibration(self.calibration)

    def bind(self, shape: ModelShape) -> BoundMethod:
        """See `Method.bind`."""
        return BoundLayers(self.model_copy(update={"roles": self._roles_on(shape)}))

    def _roles_on(self, shape: ModelShape) -> Roles:
        """The roles of the model's layers."""
        roles, place, calibrated = self.roles, "roles.", self.artefact()
        if roles is None and calibrated is not None:
            place = place_of(self.calibration)
            check_shape(calibrated.header, shape, place)
            roles, place = calibrated.layers, f"{place}: "
        if roles is None:
            roles = self._published(shape)
        others = frozenset(range(shape.num_layers)) - self.layers_of(shape.num_layers)
        return roles.resolved(shape, place, others)

    def _published(self, shape: ModelShape) -> Roles:
        for preset in self.presets:
            if preset.shape == shape:
                return preset.layers
        raise FieldError(
            "roles",
            f"no published choice for this model ({shape.model_type}, {shape.num_layers} layers)",
            f"{MAKE_ONE} and set decode.calibration: FILE",
        )

    @property
    def list_page_size(self) -> int:
        """Tokens per page of the lists."""
        return 1

    @abstractmethod
    def choose(self, call: AttentionCall, statistics: LastLogits) -> PagePlan:
        """Choose the list of a selecting layer; see `DecodeMethod.choose`."""


class BoundLayers(BoundMethod):
    """A layered method on a model: each layer has its role.

    Attributes:
        settings: the settings, with the roles of the model's layers.
        selecting: layers that choose.
        full: layers that read everything and do not choose.
    """

    _LIST: Slot[PagePlan] = Slot("list of the selecting layer")

    settings: LayeredMethod

    def __init__(self, settings: LayeredMethod) -> None:
        assert settings.roles is not None and settings.roles.select is not None, "set by LayeredMethod.bind"
        self.settings, self.correct_every = settings, settings.correct_every
        self.selecting, self.full = frozenset(settings.roles.select), frozenset(settings.roles.full)

    def role(self, layer: int) -> str:
        """ "full", "select" or "sparse"."""
        if layer in self.selecting:
            return "select"
        return "full" if layer in self.full else "sparse"

    def why_dense(self, call: AttentionCall) -> Dense | None:
        """See `BoundMethod.why_dense`."""
        return self.settings.why_dense(call)

    def plan(self, call: AttentionCall) -> Plan:
        """Read everything, with or without logits, or the list that was chosen last; see `BoundMethod.plan`."""
        if dense := self.why_dense(call):
            return dense
        role, page_size = self.role(call.layer), self.settings.list_page_size
        if role == "full":
            return Dense("full layer")
        if role == "select":
            return PagePlan.every(call, page_size, wants_logits=True)
        plan = self._LIST.get(call.forward_state)
        if plan is None or plan.pages is None or plan.counts is None:
            return Dense("no list: the selecting layer was dense")
        if plan.pages.shape[1] not in (1, call.k.shape[1], call.q.shape[1]):
            return Dense("the selecting layer has another number of heads")
        if plan.pages.device == call.q.device and plan.heads == call.q.shape[1]:
            return plan
        device = call.q.device  # layers may lie on several devices
        plan = PagePlan.of(call, plan.pages.to(device), plan.counts.to(device), page_size)
        self._LIST.put(call.forward_state, plan)
        return plan

    def select(self, call: AttentionCall, logits: torch.Tensor, lse: torch.Tensor) -> None:
        """Choose the list for the layers that follow; see `BoundMethod.select`."""
        self._LIST.put(call.forward_state, self.settings.choose(call, LastLogits(logits, lse)))


_LLAMA_2_7B = ModelShape("llama", num_layers=32, num_heads=32, num_kv_heads=32, hidden_size=4096)
_LLAMA_3_8B = ModelShape("llama", num_layers=32, num_heads=32, num_kv_heads=8, hidden_size=4096)
_QWEN_3_8B = ModelShape("qwen3", num_layers=36, num_heads=32, num_kv_heads=8, hidden_size=4096)
_QWEN_3_4B = ModelShape("qwen3", num_layers=36, num_heads=32, num_kv_heads=8, hidden_size=2560)


def _select_twice(again: int) -> Roles:
    """TidalDecode's structure: two full layers, a selecting one, sparse ones, and one that selects again."""
    return Roles(full=[0, 1], select=[2, again])


# LessIsMore is by the same authors and has TidalDecode's structure. Layers count from 0.
TIDAL_PRESETS = (
    Preset("Llama-2-7B", _LLAMA_2_7B, _select_twice(7), "TidalDecode, authors' blog"),
    Preset("Llama-3-8B, Llama-3.1-8B", _LLAMA_3_8B, _select_twice(13), "TidalDecode, public code's scripts"),
    Preset("Qwen3-8B", _QWEN_3_8B, _select_twice(12), "LessIsMore, paper"),
    Preset("Qwen3-4B", _QWEN_3_4B, _select_twice(20), "LessIsMore, paper"),
)
