"""The options of the one Transformer: only what no mixin could add."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, final

from swissarmy.core.config import Config
from swissarmy.core.errors import nearest
from swissarmy.nn.activations import ACTIVATIONS
from swissarmy.nn.norms import Norm

NormPlacement = Literal["pre", "post", "sandwich", "both"]
SIZES = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "max_sequence_length",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "encoder_hidden_size",
)


@final
@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Config):
    """Sizes and plain choices of the backbone; everything else about a model is a mixin."""

    num_layers: int
    """How many layers."""
    hidden_size: int
    """The width of the residual stream."""
    num_attention_heads: int
    """How many query heads."""
    vocab_size: int
    """How many token ids; 0 for a backbone whose input is no token (a `word_embedding_forward` mixin makes it)."""
    max_sequence_length: int
    """How many positions the model is made for."""
    padding_id: int | None = None
    """A token whose embedding gets no gradient from the input (BERT)."""

    num_key_value_heads: int | None = None
    """How many key and value heads (grouped-query attention); as many as query heads when `None`."""
    head_dim: int | None = None
    """The size of a head; `hidden_size / num_attention_heads` when `None`."""
    intermediate_size: int | None = None
    """The width inside the MLP; `4 * hidden_size` when `None`."""
    activation: str = "gelu_new"
    """The MLP's activation, by its Hugging Face name."""
    gated_mlp: bool = False
    """Whether the MLP multiplies its activation with a second projection (GLU variants)."""

    query_key_value_bias: bool = True
    """Whether the query, key and value projections have biases."""
    attention_output_bias: bool = True
    """Whether the projection after attention has a bias."""
    mlp_bias: bool = True
    """Whether the MLP's projections have biases."""
    attention_scale: float | None = None
    """What attention scores are multiplied by; `1/sqrt(head_dim)` when `None`."""

    norm: Norm = "layer"
    """The class of every normalisation."""
    norm_epsilon: float = 1e-5
    """What the normalisations add to the variance."""
    norm_placement: NormPlacement = "pre"
    """`pre`: `x + f(norm(x))`; `post`: `norm(x + f(x))`; `sandwich`: `x + norm(f(norm(x)))`;
    `both`: `norm(x + f(norm(x)))`."""
    embedding_norm: bool = False
    """Whether the sum of the embeddings is normalised (BERT)."""
    final_norm: bool = True
    """Whether the output of the last layer is normalised."""

    causal: bool = True
    """Whether the natural mask is causal; otherwise every token sees every token."""
    cross_attention: bool = False
    """Whether each layer also attends to an encoder's output."""
    encoder_hidden_size: int | None = None
    """The width of that output; `hidden_size` when `None`."""
    tie_word_embeddings: bool = True
    """Whether the head that gives logits is the word embedding; otherwise it has its own weight."""

    embedding_dropout: float = 0.0
    """Dropout on the sum of the embeddings."""
    attention_dropout: float = 0.0
    """Dropout on attention probabilities."""
    hidden_dropout: float = 0.0
    """Dropout on what attention and MLP add to the residual stream."""
    drop_path: float = 0.0
    """Chance that a row skips a sublayer (stochastic depth), growing linearly up to this at the last layer."""

    initializer_range: float = 0.02
    """Standard deviation of new weights."""
    scale_residual_init: bool = True
    """Whether projections into the residual stream start smaller by `sqrt(2 * num_layers)` (GPT-2)."""

    @property
    def kv_heads(self) -> int:
        """Key and value heads, filled in."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_size(self) -> int:
        """The size of a head, filled in."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def mlp_size(self) -> int:
        """The width inside the MLP, filled in."""
        return 4 * self.hidden_size if self.intermediate_size is None else self.intermediate_size

    def problems(self) -> Iterator[str]:
        """Sizes that cannot be, and heads that do not divide."""
        for name in SIZES:
            size = getattr(self, name)
            if size is not None and size < 1:
                yield f"{name}={size} must be at least 1"
        if self.vocab_size < 0:
            yield f"vocab_size={self.vocab_size} must not be negative"
        if self.padding_id is not None and not 0 <= self.padding_id < self.vocab_size:
            yield f"padding_id={self.padding_id} is no token of {self.vocab_size}"
        if self.head_dim is None and self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            yield (
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads="
                f"{self.num_attention_heads}; change one, or give head_dim"
            )
        if self.kv_heads > 0 and self.num_attention_heads % self.kv_heads:
            yield (
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.kv_heads}"
            )
        if self.activation not in ACTIVATIONS:
            yield f"activation='{self.activation}' is unknown.{nearest(self.activation, ACTIVATIONS)}"
        for name in ("embedding_dropout", "attention_dropout", "hidden_dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)} must be in [0, 1)"
