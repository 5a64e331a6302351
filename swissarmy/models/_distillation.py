"""`DistillationModel`: a teacher and a student in one model, which answer the same call.

Knowledge distillation (Hinton et al. 2015) compares their logits; TinyBERT (Jiang et al. 2020) and DistilBERT (Sanh et
al. 2019) compare hidden states too. The losses are a step's business: `swissarmy/training/steps/distillation.py`.

Shapes: b rows, s positions, h hidden size.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Self, final

import torch
from torch import Tensor, nn

from swissarmy.backbone.composite import CompositeModel
from swissarmy.backbone.model import BaseModel, Model
from swissarmy.core.errors import ConfigError
from swissarmy.mixins.hidden_states import HiddenStatesMixin
from swissarmy.nn.linear import Linear


class DistillationOutput(NamedTuple):
    """What `DistillationModel` gives."""

    logits: Tensor
    """The student's, with gradients."""
    teacher_logits: Tensor
    """The teacher's, without."""
    hidden_states: tuple[tuple[Tensor, Tensor], ...]
    """For each pair of layers what the student's gives, projected to the teacher's width, and what the teacher's
    gives; `[b, s, h of the teacher]`, before the final norm."""


@final
class DistillationModel(CompositeModel):
    """A teacher, frozen and always in evaluation mode, and a student that learns from it.

    The parts are `teacher` and `student`; of an encoder-decoder `teacher-encoder`, `teacher-decoder` and so on, and the
    layers that are compared are the decoder's. Add mixins to the student (`model.student.add_mixin(...)`). Both may
    share one backbone: a student that is the teacher with a LoRA of its own. Saving writes the student.
    """

    def __init__(
        self,
        teacher: Model,
        student: Model,
        *,
        layers: Mapping[int, int] | Literal["even"] | None = None,
        project: bool = False,
    ) -> None:
        """Join two models; to both a `HiddenStatesMixin` is added if layers are compared and they have none.

        Args:
            teacher: What is learned from; its parameters are frozen.
            student: What learns.
            layers: Which layer of the teacher each of the student's is compared with, by their numbers; `"even"`:
                all of the student's, spread over the teacher's with the last on the last; `None`: no layers.
            project: Whether a trained projection stands between the student's states and the teacher's even where
                their widths are the same.

        Raises:
            ConfigError: A layer that there is not, or vocabularies of different sizes.
        """
        super().__init__({**_parts("teacher", teacher), **_parts("student", student)})
        self._pair = (teacher, student)  # in a tuple, because their parts are registered already
        ours, theirs = _last_part(student), _last_part(teacher)
        if ours.config.vocab_size != theirs.config.vocab_size:
            raise ConfigError(
                f"the student's vocabulary has {ours.config.vocab_size} tokens and the teacher's "
                f"{theirs.config.vocab_size}: their logits cannot be compared."
            )
        self.layers = _checked(layers, ours.config.num_layers, theirs.config.num_layers)
        project = project or ours.config.hidden_size != theirs.config.hidden_size
        self.projections = _projections(ours, theirs.config.hidden_size, self.layers if project else {})
        for part in (ours, theirs):
            if self.layers and part.find_mixin(HiddenStatesMixin) is None:
                part.add_mixin("hidden-states", HiddenStatesMixin())
        self._keep_teacher()

    @property
    def teacher(self) -> Model:
        """What is learned from."""
        return self._pair[0]

    @property
    def student(self) -> Model:
        """What learns."""
        return self._pair[1]

    def forward(self, *arguments: Any, **kw_args: Any) -> DistillationOutput:
        """Call both; a keyword that only one of them accepts reaches that one."""
        with torch.no_grad():
            theirs = self.teacher(*arguments, **self._for(self.teacher, self.student, kw_args))
        ours = self.student(*arguments, **self._for(self.student, self.teacher, kw_args))
        pairs = tuple(
            (self._projected(layer, ours[1 + layer]["hidden_states"]), theirs[1 + other]["hidden_states"])
            for layer, other in self.layers.items()
        )
        return DistillationOutput(ours[0], theirs[0], pairs)

    def train(self, mode: bool = True) -> Self:
        """Training mode for the student; the teacher stays as it evaluates."""
        super().train(mode)
        self._keep_teacher()
        return self

    def freeze_except(self, *patterns: str) -> Self:
        """As for every model, apart from the teacher, which never trains."""
        super().freeze_except(*patterns)
        self._keep_teacher()
        return self

    @property
    def saved(self) -> Model:
        """The student: the teacher was needed to train it, and is saved already."""
        return self.student

    def for_decoding(self, **kw_args: Any) -> tuple[BaseModel, dict[str, Any]]:
        """The student's."""
        return self.student.for_decoding(**kw_args)

    def _keep_teacher(self) -> None:
        for name in _parts("teacher", self.teacher):
            self.part(name).eval().requires_grad_(False)

    def _projected(self, layer: int, hidden_states: Tensor) -> Tensor:
        key = str(layer)
        projected: Tensor = self.projections[key](hidden_states) if key in self.projections else hidden_states
        return projected

    def _for(self, model: Model, other: Model, kw_args: Mapping[str, Any]) -> dict[str, Any]:
        """The keywords of the call without those that only the other model accepts."""
        only_other = _accepted(other) - _accepted(model)
        return {keyword: value for keyword, value in kw_args.items() if keyword not in only_other}


def _parts(name: str, model: Model) -> dict[str, BaseModel]:
    if isinstance(model, BaseModel):
        return {name: model}
    assert isinstance(model, CompositeModel)
    return {f"{name}-{part}": model.part(part) for part in model.parts}


def _last_part(model: Model) -> BaseModel:
    """The plain model whose layers' outputs a call returns."""
    return list(_parts("", model).values())[-1]


def _accepted(model: Model) -> frozenset[str]:
    return frozenset().union(*(part.accepted for part in _parts("", model).values()))


def _checked(layers: Mapping[int, int] | Literal["even"] | None, ours: int, theirs: int) -> dict[int, int]:
    """The pairs of layers, all of which there are."""
    if layers == "even":
        return {layer: -(-(layer + 1) * theirs // ours) - 1 for layer in range(ours)}
    pairs = dict(layers or {})
    for layer, other in pairs.items():
        if layer not in range(ours) or other not in range(theirs):
            raise ConfigError(
                f"layers: {{{layer}: {other}}} is no pair; the student has layers 0 to {ours - 1} and the teacher "
                f"0 to {theirs - 1}."
            )
    return pairs


def _projections(student: BaseModel, width: int, layers: Mapping[int, int]) -> nn.ModuleDict:
    """A trained projection to the teacher's width for each of the student's layers that is compared."""
    made = {str(layer): Linear(student.config.hidden_size, width, bias=False) for layer in layers}
    return nn.ModuleDict(made).to(device=student.device, dtype=student.dtype)
