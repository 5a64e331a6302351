"""Weights in 16, 8 or 4 bits: what decoding reads for each token, and what a model takes in memory, shrinks with them.

Changes: the projections of every layer are replaced by `nn.reduced_linear`'s; so are the word embedding and the head,
where no other mixin answers for them. For inference, and for training others on top (QLoRA, Dettmers et al. 2023).
Hooks: `linear_forward`, `word_embedding_forward`, `final_forward` (replace, unless another mixin does).
Parameters: none; what is reduced is made from the model's weights, and is not saved.
"""

from collections.abc import Sequence
from typing import Any, Self, final, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swissarmy.backbone.defaults import DEFAULTS, look_up
from swissarmy.backbone.model import BaseModel, Model
from swissarmy.backbone.projections import Projection, plain_models, projections_of
from swissarmy.core.errors import ConfigError, nearest
from swissarmy.core.hooks import answers, mark_of, replaceable
from swissarmy.core.mixin import BaseMixin, MixinHost
from swissarmy.nn.reduced_linear import Kind, ReducedLinear, reduce_linear, rounded_rows

NAME = "reduced-weights"
"""What `reduce_weights` calls the mixin."""


@final
class ReducedTable(nn.Module):
    """A word embedding in float16, or in 8 bits with a scale for each row."""

    def __init__(self, weight: Tensor, kind: Kind) -> None:
        """Reduce `[vocab, h]`."""
        super().__init__()
        self.rows: Tensor
        self.like: Tensor
        self.scale: Tensor | None
        self.rows, self.scale = (weight.half(), None) if kind == "fp16" else rounded_rows(weight)
        self.num_embeddings = len(weight)
        self.register_buffer("like", weight.new_empty(0), persistent=False)  # of the model's precision, and stays so

    @property
    def held(self) -> tuple[Tensor, ...]:
        """What stands for the weight."""
        return (self.rows,) if self.scale is None else (self.rows, self.scale)

    def forward(self, input_ids: Tensor) -> Tensor:
        """`[b, s]` token ids to `[b, s, h]`."""
        rows = F.embedding(input_ids, self.rows).to(self.like.dtype)
        return rows if self.scale is None else rows * self.scale[input_ids][..., None].to(self.like.dtype)


@final
class ReducedLayer(nn.ModuleDict):
    """The reduced projections of one layer; names have underscores for dots."""

    def __init__(self, projections: Sequence[Projection], kind: Kind) -> None:
        """Reduce them."""
        super().__init__(
            {_key(each.name): reduce_linear(each.linear.weight, each.linear.bias, kind) for each in projections}
        )

    def forward(self, x: Tensor, linear: nn.Module, name: str) -> Tensor:
        """The projection of that name; one that was not reduced is called itself."""
        key = _key(name)
        product: Tensor = self[key](x) if key in self else linear(x)
        return product


@final
class ReducedWeightsMixin(BaseMixin):
    """Projections, word embedding and head in fewer bits; made by `for_model` from the model's weights."""

    keeps_outputs = True  # but for the rounding

    def __init__(self, layers: Sequence[ReducedLayer], table: ReducedTable | None, head: ReducedLinear | None) -> None:
        """Hold what is reduced; without a table and a head, these stay the model's own."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.table, self.head = table, head

    @classmethod
    def for_model(cls, model: MixinHost, **options: Any) -> Any:
        """Reduce the weights of a model, or of each part of one.

        Args:
            model: Whose weights to reduce; they stay as they are.
            **options: `kind`: `"fp16"`, `"int8"` or `"int4"`.

        Raises:
            ConfigError: No such kind.
        """
        assert isinstance(model, Model)
        kind = check_kind(**options)
        made = {name: cls._of(part, kind) for name, part in plain_models(model).items()}
        return made if model.parts else made[""]

    @classmethod
    def _of(cls, model: BaseModel, kind: Kind) -> Self:
        projections = projections_of(model)
        layers = [
            ReducedLayer([each for each in projections if each.layer_id == layer_id], kind)
            for layer_id in range(model.config.num_layers)
        ]
        table, head = model.transformer.word_embeddings, model.transformer.lm_head
        if table is None or not _owns_ends(model):
            return cls(layers, None, None)
        weight = table.weight.detach()
        head_kind: Kind = "int8" if kind == "int4" else kind  # 4 bits cost a head too much
        whole = reduce_linear(weight if head is None else head.weight, None, head_kind)
        return cls(layers, ReducedTable(weight, kind), whole)

    @replaceable
    def linear_forward(self, x: Tensor, linear: nn.Module, name: str, **kw_args: Any) -> Tensor:
        """A reduced projection in place of the model's."""
        product: Tensor = self.layers[kw_args["layer_id"]](x, linear, name)
        return product

    @replaceable
    def word_embedding_forward(self, input_ids: Tensor, **kw_args: Any) -> Tensor:
        """Rows of the reduced table, `[b, s, h]`."""
        return look_up(self.table or kw_args["transformer"].word_embeddings, input_ids)

    @replaceable
    def final_forward(self, hidden_states: Tensor, **kw_args: Any) -> Tensor:
        """Logits `[b, s, vocab]` from the reduced head."""
        if self.head is None:
            logits: Tensor = DEFAULTS.final_forward(hidden_states, **kw_args)
        else:
            logits = self.head(hidden_states)
        return logits


def reduce_weights(model: Model, kind: Kind) -> None:
    """Add the mixin, and let go of the weights that it stands in for: they go to the meta device, for good."""
    parts = plain_models(model).values()
    model.add_mixin(NAME, ReducedWeightsMixin.for_model(model, kind=kind))
    still_read = [part.transformer.word_embeddings for part in parts if not _has_own_ends(part)]
    for part in parts:
        for projection in projections_of(part):
            _let_go(projection.linear)
        if _has_own_ends(part):
            _let_go(part.transformer.lm_head)
            if part.transformer.word_embeddings not in still_read:  # parts may share it
                _let_go(part.transformer.word_embeddings)


def check_kind(kind: str = "") -> Kind:
    """The kind, if there is one of that name.

    Raises:
        ConfigError: There is none.
    """
    kinds: tuple[Kind, ...] = get_args(Kind)
    for known in kinds:
        if kind == known:
            return known
    raise ConfigError(f"quantize={kind!r} is not known.{nearest(kind, kinds)} There are: fp16, int8, int4.")


def _owns_ends(model: BaseModel) -> bool:
    """Whether the word embedding and the head are the backbone's own business, and no mixin's."""
    return not any(
        answers(mixin, hook) and mark_of(getattr(mixin, hook)).kind != "non_conflict"
        for mixin in model.mixins.values()
        for hook in ("word_embedding_forward", "final_forward")
    )


def _has_own_ends(part: BaseModel) -> bool:
    mixin = part.get_mixin(NAME)
    return isinstance(mixin, ReducedWeightsMixin) and mixin.head is not None


def _let_go(module: nn.Module | None) -> None:
    for name, parameter in [] if module is None else list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))


def _key(name: str) -> str:
    return name.replace(".", "_")
