"""Heads: what a model makes of its last hidden states.

Hooks: `final_forward` (replaces; wraps, in what only changes what a head is given). Parameters: each head's own; a
head that shares the word embedding reads it from the backbone.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Self, final

import torch
from torch import Tensor, nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.core.errors import HookCallError
from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.core.mixin import BaseMixin, SharedDim
from swissarmy.nn.activations import ACTIVATIONS
from swissarmy.nn.linear import Linear, linear
from swissarmy.nn.norms import make_norm

Pooling = Literal["tokens", "first", "last", "mean", "first_two"]


class PooledOutput(NamedTuple):
    """What `PoolerMixin` gives."""

    hidden_states: Tensor
    """`[b, s, h]`."""
    pooled: Tensor
    """`[b, h]`."""


@final
class NoHeadMixin(BaseMixin):
    """The hidden states themselves, `[b, s, h]`: a base model."""

    @property
    def saved_options(self) -> dict[str, Any]:
        """What it was made with."""
        return {}

    def final_forward(self, hidden_states: Tensor, **kw_args: Any) -> Tensor:
        """Hand them out as they are."""
        return hidden_states


@final
class LMHeadMixin(BaseMixin):
    """A head of its own that gives logits over a vocabulary, for any backbone. Parameters: `head.*`."""

    shared_dims: ClassVar[Mapping[str, SharedDim]] = {"head.*": SharedDim(0, "vocabulary")}

    def __init__(self, hidden_size: int, vocab_size: int, *, bias: bool = False) -> None:
        """Make the projection."""
        super().__init__()
        self.head = Linear(hidden_size, vocab_size, bias=bias)
        nn.init.normal_(self.head.weight, std=0.02)

    @classmethod
    def for_config(cls, config: TransformerConfig, **options: Any) -> Self:
        """The model's width and vocabulary."""
        return cls(config.hidden_size, **{"vocab_size": config.vocab_size, **options})

    @property
    def saved_options(self) -> dict[str, Any]:
        """What it was made with."""
        return {"vocab_size": self.head.out_features, "bias": self.head.bias is not None}

    def final_forward(self, hidden_states: Tensor, **kw_args: Any) -> Tensor:
        """Logits, `[b, s, vocab]`."""
        logits: Tensor = self.head(hidden_states)
        return logits


@final
class MLMHeadMixin(BaseMixin):
    """BERT's masked-LM head: a layer and a norm, then the word embedding and a bias.

    Parameters: `dense.*`, `norm.*`, `bias` `[vocab]`; with `tied=False` also `decoder.weight` `[vocab, h]`.
    """

    shared_dims: ClassVar[Mapping[str, SharedDim]] = {
        "bias": SharedDim(0, "vocabulary"),
        "decoder.weight": SharedDim(0, "vocabulary"),
    }

    def __init__(
        self, hidden_size: int, vocab_size: int, *, activation: str = "gelu", eps: float = 1e-12, tied: bool = True
    ) -> None:
        """Make the layer, the norm and the bias."""
        super().__init__()
        self._options = {"activation": activation, "eps": eps, "tied": tied}
        self.activation = ACTIVATIONS[activation]
        self.dense = Linear(hidden_size, hidden_size)
        self.norm = make_norm("layer", hidden_size, eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.decoder = None if tied else Linear(hidden_size, vocab_size, bias=False)

    @classmethod
    def for_config(cls, config: TransformerConfig, **options: Any) -> Self:
        """The model's width, vocabulary and activation."""
        return cls(config.hidden_size, config.vocab_size, **{"activation": config.activation, **options})

    @property
    def saved_options(self) -> dict[str, Any]:
        """What it was made with."""
        return self._options

    def final_forward(self, hidden_states: Tensor, **kw_args: Any) -> Tensor:
        """Logits, `[b, s, vocab]`."""
        hidden_states = self.norm(self.activation(self.dense(hidden_states)))
        weights = kw_args["transformer"].word_embeddings if self.decoder is None else self.decoder
        return linear(hidden_states, weights.weight, self.bias)


@final
class PoolerMixin(BaseMixin):
    """BERT's pooler: hidden states, and a layer with tanh over the first of them. Parameters: `dense.*`."""

    def __init__(self, hidden_size: int, *, activation: str = "tanh", output_size: int | None = None) -> None:
        """Make the layer."""
        super().__init__()
        self._options = {"activation": activation, "output_size": output_size}
        self.activation = ACTIVATIONS[activation]
        self.dense = Linear(hidden_size, output_size or hidden_size)

    @classmethod
    def for_config(cls, config: TransformerConfig, **options: Any) -> Self:
        """The model's width."""
        return cls(config.hidden_size, **options)

    @property
    def saved_options(self) -> dict[str, Any]:
        """What it was made with."""
        return self._options

    def final_forward(self, hidden_states: Tensor, **kw_args: Any) -> PooledOutput:
        """The hidden states `[b, s, h]`, and the pooled one `[b, h]`."""
        return PooledOutput(hidden_states, self.activation(self.dense(hidden_states[:, 0])))


@final
class ClassificationHeadMixin(BaseMixin):
    """Scores for labels, of the whole input or of each token.

    Parameters: `classifier.*`, and when `activation` is given `dense.*` before it.
    """

    def __init__(
        self,
        hidden_size: int,
        num_labels: int,
        *,
        pooling: Pooling = "first",
        activation: str | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        input_dropout: float | None = None,
        padding_id: int | None = None,
    ) -> None:
        """Make the head.

        Args:
            hidden_size: The model's width.
            num_labels: How many scores.
            pooling: Which hidden state is classified: each token's, the first, the last real one, the mean of the
                real ones, or the mean of the scores of the first two, each from a classifier of its own (DeiT).
            activation: Of a layer before the classifier; no such layer when `None`.
            bias: Whether the classifier has a bias.
            dropout: Before the classifier.
            input_dropout: Before the layer; as much as `dropout` when `None`.
            padding_id: Which token is padding where the caller gives no `padding_mask`.
        """
        super().__init__()
        self._options = {
            "num_labels": num_labels,
            "pooling": pooling,
            "activation": activation,
            "bias": bias,
            "dropout": dropout,
            "input_dropout": input_dropout,
            "padding_id": padding_id,
        }
        self.num_labels, self.pooling, self.padding_id = num_labels, pooling, padding_id
        self.dense = None if activation is None else Linear(hidden_size, hidden_size)
        self.activation = nn.Identity() if activation is None else ACTIVATIONS[activation]
        self.dropout = nn.Dropout(dropout)
        self.input_dropout = nn.Dropout(dropout if input_dropout is None else input_dropout)
        self.classifier = Linear(hidden_size, num_labels, bias=bias)
        self.second = Linear(hidden_size, num_labels, bias=bias) if pooling == "first_two" else None

    @classmethod
    def for_config(cls, config: TransformerConfig, *, num_labels: int = 2, **options: Any) -> Self:
        """The model's width; the last token where it is causal, else the first."""
        return cls(config.hidden_size, num_labels, **{"pooling": "last" if config.causal else "first", **options})

    @property
    def saved_options(self) -> dict[str, Any]:
        """What it was made with."""
        return self._options

    def final_forward(self, hidden_states: Tensor, **kw_args: Any) -> Tensor:
        """Scores `[b, num_labels]`, or `[b, s, num_labels]` for each token."""
        if self.second is not None:
            both: Tensor = (self.classifier(hidden_states[:, 0]) + self.second(hidden_states[:, 1])) / 2
            return both
        pooled = self._pool(hidden_states, kw_args)
        if self.dense is not None:
            pooled = self.activation(self.dense(self.input_dropout(pooled)))
        scores: Tensor = self.classifier(self.dropout(pooled))
        return scores

    def _pool(self, hidden_states: Tensor, kw_args: dict[str, Any]) -> Tensor:
        if self.pooling == "tokens":
            return hidden_states
        if self.pooling == "first":
            return hidden_states[:, 0]
        real = self._real(hidden_states, kw_args)
        if self.pooling == "mean":
            share = real / real.sum(dim=1, keepdim=True).clamp(min=1)
            return (hidden_states * share[..., None].to(hidden_states.dtype)).sum(dim=1)
        places = torch.arange(real.shape[1], device=real.device)
        last = (places * real).argmax(dim=1)
        return hidden_states[torch.arange(len(last), device=last.device), last]

    def _real(self, hidden_states: Tensor, kw_args: dict[str, Any]) -> Tensor:
        """Which tokens are no padding, `[b, s]`."""
        padding_mask, input_ids = kw_args["padding_mask"], kw_args["input_ids"]
        if padding_mask is not None:
            mask: Tensor = padding_mask[:, -hidden_states.shape[1] :].long()
            return mask
        if self.padding_id is not None and input_ids is not None:
            real: Tensor = (input_ids != self.padding_id).long()
            return real
        return torch.ones(hidden_states.shape[:2], dtype=torch.long, device=hidden_states.device)


class PreTrainingOutput(NamedTuple):
    """What `PreTrainingHeadMixin` gives."""

    predictions: Tensor
    """Logits of each token, `[b, s, vocab]`."""
    next_sentence: Tensor
    """Scores of "the second segment follows the first" and "it does not", `[b, 2]`."""


@final
class PreTrainingHeadMixin(BaseMixin):
    """BERT's two heads for pretraining. Parameters: `predictions.*`, `next_sentence.*`."""

    shared_dims: ClassVar[Mapping[str, SharedDim]] = {
        f"predictions.{name}": shared for name, shared in MLMHeadMixin.shared_dims.items()
    }

    def __init__(self, predictions: MLMHeadMixin, next_sentence: ClassificationHeadMixin) -> None:
        """Hold both heads."""
        super().__init__()
        self.predictions, self.next_sentence = predictions, next_sentence

    def final_forward(self, hidden_states: Tensor, **kw_args: Any) -> PreTrainingOutput:
        """What each of them gives."""
        return PreTrainingOutput(
            self.predictions.final_forward(hidden_states, **kw_args),
            self.next_sentence.final_forward(hidden_states, **kw_args),
        )


@final
class LogitScaleMixin(BaseMixin):
    """Hidden states times a constant before the head: what a linear head gives is scaled by it (T5)."""

    def __init__(self, scale: float) -> None:
        """Set the scale."""
        super().__init__()
        self.scale = scale

    @non_conflict
    def final_forward(self, hidden_states: Tensor, *, old_impl: Hook, **kw_args: Any) -> Any:
        """Scale `[b, s, h]`."""
        return old_impl(hidden_states * self.scale, **kw_args)


@final
class SourceEndMixin(BaseMixin):
    """In a decoder: the head is given only the state where the source has its last end token (T5, BART)."""

    def __init__(self, end_id: int) -> None:
        """Set the end token."""
        super().__init__()
        self.end_id = end_id

    @non_conflict
    def final_forward(
        self, hidden_states: Tensor, *, old_impl: Hook, source_ids: Tensor | None = None, **kw_args: Any
    ) -> Any:
        """`[b, s, h]` to `[b, 1, h]` for the head; `source_ids` `[b, s]` are the source's tokens."""
        if source_ids is None or source_ids.shape != hidden_states.shape[:2]:
            raise HookCallError("the head looks for the source's end: give input_ids as long as decoder_input_ids.")
        places = torch.arange(source_ids.shape[1], device=source_ids.device)
        last = (places * (source_ids == self.end_id)).argmax(dim=1)
        return old_impl(hidden_states[torch.arange(len(last), device=last.device), last][:, None], **kw_args)
