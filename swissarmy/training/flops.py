"""How much arithmetic a training step is, in floating-point operations.

Counted is what the model asks for (PaLM, Chowdhery et al. 2022, appendix B): nothing for padding, and nothing for what
activation checkpointing does a second time. Of a model whose parameters all train, a token takes

    6 N + 12 layers * heads * head_size * length      floating-point operations,

where N counts the weights that a token is multiplied with: not the tables it is looked up in, the head also where it
shares the embedding's weights, and of experts only those that it is sent to. A third of it is the forward pass, a
third the gradients of activations, a third those of weights. So frozen weights have no last third, and what lies
before the first weight that trains has the first third only. Causal masks and sliding windows are not deducted.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Self, final

from torch import nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.model import BaseModel, Model, iterate_models
from swissarmy.core.hooks import answers, mark_of
from swissarmy.mixins.mixture_of_experts import Experts, MixtureOfExpertsMixin

_LAYER: Final = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@final
@dataclass(frozen=True, kw_only=True)
class PartCost:
    """The arithmetic of one backbone, in floating-point operations; a forward pass, and the gradients after it."""

    per_token: float
    """For each of its tokens."""
    per_pair: float
    """For each pair of two of its tokens in one sample, where it attends to itself."""
    per_source_pair: float
    """For each pair of a token and one of the encoder's, where it attends to an encoder."""
    positions: int | None
    """How many positions a sample always has, where its input is no text; `None` otherwise."""

    def flops(self, tokens: float, samples: float, source_tokens: float) -> float:
        """For so many tokens in so many samples of about the same length, which see so many tokens of an encoder."""
        if self.positions is not None:
            tokens = samples * self.positions
        length, source_length = tokens / samples, source_tokens / samples
        return tokens * (self.per_token + self.per_pair * length + self.per_source_pair * source_length)


@final
@dataclass(frozen=True)
class TrainingCost:
    """What training a model takes; made once, because it reads the names of all parameters."""

    parts: tuple[PartCost, ...]
    """In the order in which a sample passes through them; one for a plain model."""

    @classmethod
    def of(cls, model: Model) -> Self:
        """The cost of a model as it is: what is frozen, which mixins it has. Sharded parameters count whole."""
        parts, behind_trained = list[PartCost](), False
        for _, plain in iterate_models(model):
            parts.append(_part_cost(plain, behind_trained=behind_trained))
            behind_trained |= any(parameter.requires_grad for parameter in plain.parameters())
        return cls(tuple(parts))

    def flops(self, tokens: float, samples: float, *, targets: float = 0.0) -> float:
        """Floating-point operations of the forward and backward passes over some samples.

        Args:
            tokens: Tokens that are no padding, over all parts.
            samples: How many samples they are in.
            targets: How many of them the decoder reads, in a model of encoder and decoder; half when 0 or all.
        """
        if tokens <= 0 or samples <= 0:
            return 0.0
        if len(self.parts) == 1:
            return self.parts[0].flops(tokens, samples, 0.0)
        last = targets if 0 < targets < tokens else tokens / 2
        first = (tokens - last) / (len(self.parts) - 1)
        before = [part.flops(first, samples, 0.0) for part in self.parts[:-1]]
        return sum(before) + self.parts[-1].flops(last, samples, first)


@final
@dataclass(frozen=True)
class _Product:
    """A weight that tokens are multiplied with."""

    stage: float
    """0 before the layers, 1 in the first of them, ..., infinity after the last."""
    size: float
    trains: bool


def _part_cost(model: BaseModel, *, behind_trained: bool) -> PartCost:
    config, products = model.config, list(_products(model))
    stages = [_stage(name) for name, parameter in model.named_parameters() if parameter.requires_grad]
    first = 0.0 if behind_trained else min(stages, default=math.inf)
    has_backward = behind_trained or bool(stages)
    trained = [product for product in products if product.trains]
    passed = [product for product in products if has_backward and product.stage >= first]
    through = sum(has_backward and layer + 1 >= first for layer in range(config.num_layers))
    width = config.num_attention_heads * config.head_size
    attention = 4.0 * width * (config.num_layers + 2 * through)
    return PartCost(
        per_token=2.0 * sum(product.size for product in [*products, *passed, *trained]),
        per_pair=attention,
        per_source_pair=attention if config.cross_attention else 0.0,
        positions=None if config.vocab_size else config.max_sequence_length,
    )


def _products(model: BaseModel) -> Iterator[_Product]:
    """Every weight of two or more dimensions, but for tables; the keys and values of a prefix are such weights too."""
    shares = {id(parameter): share for mixin, share in _experts(model) for parameter in mixin.parameters()}
    seen = set[int]()
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.dim() >= 2 and id(parameter) not in seen:
                seen.add(id(parameter))
                size = parameter.numel() * shares.get(id(parameter), 1.0)
                yield _Product(_stage(name), size, parameter.requires_grad)
    table = model.transformer.word_embeddings
    if table is not None and _has_tied_head(model):
        yield _Product(math.inf, table.weight.numel(), table.weight.requires_grad)


def _stage(name: str) -> float:
    layer = _LAYER.search(name)
    if layer is not None:
        return int(layer[1]) + 1
    before = "embedding" in name or "position" in name or name.startswith("mixins.patch")
    return 0.0 if before else math.inf


def _experts(model: BaseModel) -> Iterator[tuple[nn.Module, float]]:
    """The experts of each layer, and the share of them that a token is sent to."""
    for mixin in model.mixins.values():
        if isinstance(mixin, MixtureOfExpertsMixin):
            for experts in (layer.experts for layer in mixin.layers if isinstance(layer, Experts)):
                yield experts, mixin.top_k / len(experts)


def _has_tied_head(model: BaseModel) -> bool:
    """Whether the word embedding's weights give the logits.

    They do where nothing replaces the backbone's head and that has no weight of its own, and where a mixin's head
    declares a vocabulary and has no weight over it.
    """
    heads = [mixin for mixin in (model, *model.mixins.values()) if _replaces_the_head(mixin)]
    if not heads:
        return model.transformer.lm_head is None
    return any(_declares_vocabulary(head) and not _has_weight_over(model.config, head) for head in heads)


def _replaces_the_head(answerer: nn.Module) -> bool:
    hook = "final_forward"
    return answers(answerer, hook) and mark_of(getattr(answerer, hook)).kind != "non_conflict"


def _declares_vocabulary(head: nn.Module) -> bool:
    return any(shared.of == "vocabulary" for shared in getattr(head, "shared_dims", {}).values())


def _has_weight_over(config: TransformerConfig, head: nn.Module) -> bool:
    return any(each.dim() >= 2 and each.shape[0] == config.vocab_size for each in head.parameters())
