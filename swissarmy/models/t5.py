"""T5 1.0 and 1.1 (Raffel et al. 2020; Shazeer 2020): an encoder and a decoder with relative position bias.

Attention scores are not scaled and nothing has a bias; version 1.0 ties its head to the word embedding and scales
what it is given, version 1.1 has a head of its own and a gated MLP.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor, nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.encoder_decoder import EncoderDecoderModel
from swissarmy.backbone.model import BaseModel
from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.core.mixin import BaseMixin
from swissarmy.core.weight_map import Rule, WeightMap, same
from swissarmy.mixins.heads import ClassificationHeadMixin, LogitScaleMixin, NoHeadMixin, SourceEndMixin
from swissarmy.mixins.relative_position_bias import RelativePositionBiasMixin
from swissarmy.models._family import Family, FamilyConfig, Preset

VERSION_1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
ENCODER_ONLY = ("T5EncoderModel", "T5ForTokenClassification")
CLASSIFIERS = {"T5ForSequenceClassification": "classification_head.out_proj", "T5ForQuestionAnswering": "qa_outputs"}


@final
@dataclass(frozen=True, kw_only=True)
class T5Config(FamilyConfig):
    """`config.json` of T5."""

    ignored = frozenset({"output_past", "is_gated_act"})
    renamed: ClassVar[Mapping[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    }

    vocab_size: int = 32128
    n_positions: int = 512
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    classifier_dropout: float = 0.0
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    dense_act_fn: str | None = None
    """The activation, where it is not what `feed_forward_proj` says."""
    scale_decoder_outputs: bool | None = None
    """Whether the head is given hidden states times `d_model**-0.5`; as `tie_word_embeddings` says when `None`.
    Newer files of version 1.1 have it at false, and a `tie_word_embeddings` that says nothing."""
    pad_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    decoder_start_token_id: int | None = None

    def problems(self) -> Iterator[str]:
        """A form of MLP that is none, and a classifier that does not know where the source ends."""
        yield from super().problems()
        if len(self._projection) > 2 or self._projection[:-1] not in ([], ["gated"]):
            yield f"feed_forward_proj='{self.feed_forward_proj}' is neither an activation nor 'gated-' and one"
        if self.architecture == "T5ForSequenceClassification" and not isinstance(self.eos_token_id, int):
            yield f"eos_token_id={self.eos_token_id} must be one id: its place is what {self.architecture} classifies"

    @property
    def activation(self) -> str:
        """The MLP's activation; the gated GELU is the tanh one."""
        computed = "gelu_new" if self.feed_forward_proj == "gated-gelu" else self._projection[-1]
        return self.dense_act_fn or computed

    @property
    def gated(self) -> bool:
        """Whether the MLP is gated."""
        return self._projection[0] == "gated"

    @property
    def scaled(self) -> bool:
        """Whether the head is given scaled hidden states."""
        return self.tie_word_embeddings if self.scale_decoder_outputs is None else self.scale_decoder_outputs

    @property
    def own_head(self) -> bool:
        """Whether the head has a weight of its own."""
        return self.architecture == "T5ForConditionalGeneration" and not (self.tie_word_embeddings and self.scaled)

    @property
    def _projection(self) -> list[str]:
        return self.feed_forward_proj.split("-")


@final
class T5DropoutMixin(BaseMixin):
    """The dropouts that only T5 has: inside the MLP, and on what the last norm gives.

    Hooks: `linear_forward` (wraps), `final_forward` (wraps). Parameters: none.
    """

    def __init__(self, rate: float) -> None:
        """Set the rate."""
        super().__init__()
        self.dropout = nn.Dropout(rate)

    @non_conflict
    def linear_forward(self, x: Tensor, linear: nn.Module, name: str, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        """Drop some of what the MLP's last projection is given."""
        projected: Tensor = old_impl(self.dropout(x) if name == "mlp.down" else x, linear, name, **kw_args)
        return projected

    @non_conflict
    def final_forward(self, hidden_states: Tensor, *, old_impl: Hook, **kw_args: Any) -> Any:
        """Drop some of what the head is given."""
        return old_impl(self.dropout(hidden_states), **kw_args)


def build(config: T5Config) -> BaseModel | EncoderDecoderModel:
    """Encoder and decoder with shared word embeddings; an encoder alone where the architecture has no decoder."""
    encoder = _stack(config, decoder=False)
    if config.architecture in ENCODER_ONLY:
        return encoder
    shifted = config.architecture in ("T5ForSequenceClassification", "T5ForQuestionAnswering")
    return EncoderDecoderModel(
        encoder,
        _stack(config, decoder=True),
        start_token_id=config.decoder_start_token_id if shifted else None,
    )


def _stack(config: T5Config, *, decoder: bool) -> BaseModel:
    layers = config.num_layers if config.num_decoder_layers is None else config.num_decoder_layers
    backbone = TransformerConfig(
        num_layers=layers if decoder else config.num_layers,
        hidden_size=config.d_model,
        num_attention_heads=config.num_heads,
        head_dim=config.d_kv,
        intermediate_size=config.d_ff,
        vocab_size=config.vocab_size,
        max_sequence_length=config.n_positions,
        activation=config.activation,
        gated_mlp=config.gated,
        query_key_value_bias=False,
        attention_output_bias=False,
        mlp_bias=False,
        attention_scale=1.0,
        norm="rms_t5",
        norm_epsilon=config.layer_norm_epsilon,
        causal=decoder,
        cross_attention=decoder,
        tie_word_embeddings=not (decoder and config.own_head),
        embedding_dropout=config.dropout_rate,
        attention_dropout=config.dropout_rate,
        hidden_dropout=config.dropout_rate,
    )
    positions = RelativePositionBiasMixin.for_config(
        backbone,
        num_buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
    )
    last = decoder or config.architecture in ENCODER_ONLY
    model = BaseModel(backbone, {"positions": positions, **(_head(config) if last else {"head": NoHeadMixin()})})
    if config.dropout_rate:
        model.add_mixin("dropout", T5DropoutMixin(config.dropout_rate))
    _initialize(model, config)
    return model


def _head(config: T5Config) -> dict[str, BaseMixin]:
    dropout = config.classifier_dropout
    match config.architecture:
        case "T5ForConditionalGeneration":
            return {"scale": LogitScaleMixin(config.d_model**-0.5)} if config.scaled else {}
        case "T5ForSequenceClassification":
            assert isinstance(config.eos_token_id, int)
            head = ClassificationHeadMixin(config.d_model, config.num_labels, activation="tanh", dropout=dropout)
            return {"head": head, "source_end": SourceEndMixin(config.eos_token_id)}
        case "T5ForTokenClassification":
            head = ClassificationHeadMixin(config.d_model, config.num_labels, pooling="tokens", dropout=dropout)
            return {"head": head}
        case "T5ForQuestionAnswering":
            return {"head": ClassificationHeadMixin(config.d_model, 2, pooling="tokens")}
        case _:
            return {"head": NoHeadMixin()}


def _initialize(model: BaseModel, config: T5Config) -> None:
    """Starting values that keep unscaled attention in range: each matrix by the size of its input."""
    deviations = {
        "word_embeddings": 1.0,
        "query": (config.d_model * config.d_kv) ** -0.5,
        "output": (config.num_heads * config.d_kv) ** -0.5,
        "down": config.d_ff**-0.5,
    }
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            deviation = deviations.get(name.split(".")[-2], config.d_model**-0.5)
            nn.init.normal_(parameter, std=config.initializer_factor * deviation)


def weights(config: T5Config) -> WeightMap:
    """One shared word embedding; a table of position biases in the first block of each stack, for all of them."""
    wrapped = config.architecture in ("T5ForSequenceClassification", "T5ForTokenClassification")
    alone = config.architecture in ENCODER_ONLY
    base = "transformer." if wrapped else ""
    encoder, decoder = ("", "") if alone else ("parts.encoder.", "parts.decoder.")
    head = f"{decoder}mixins.head"
    shared = f"{base}shared.weight"
    duplicates = [f"{base}encoder.embed_tokens.weight", f"{base}decoder.embed_tokens.weight"]
    ignored = [f"{base}decoder.block.{{i}}.layer.1.EncDecAttention.relative_attention_bias.weight"]
    if alone:
        ignored += [f"{base}decoder.{{rest}}", "lm_head.weight"]
    fallbacks = {shared: f"{base}encoder.embed_tokens.weight"}
    if config.own_head:
        fallbacks["lm_head.weight"] = shared
    elif not alone:
        duplicates.append("lm_head.weight")
    return WeightMap(
        prefix="transformer.",
        rules=(
            same(shared, f"{encoder}transformer.word_embeddings.weight"),
            *_stack_rules(config, f"{base}encoder", encoder, decoder=False),
            *(() if alone else _stack_rules(config, f"{base}decoder", decoder, decoder=True)),
            same("lm_head.weight", "parts.decoder.transformer.lm_head.weight"),
            same("classification_head.dense.{p}", f"{head}.dense.{{p}}"),
            same(f"{CLASSIFIERS.get(config.architecture, 'classifier')}.{{p}}", f"{head}.classifier.{{p}}"),
        ),
        ignored=tuple(ignored),
        duplicates=dict.fromkeys(duplicates, shared),
        fallbacks=fallbacks,
    )


def _stack_rules(config: T5Config, theirs: str, ours: str, *, decoder: bool) -> list[Rule]:
    """The rules of one stack; in theirs a layer's sublayers are numbered."""
    names = {"SelfAttention": "attention", **({"EncDecAttention": "cross_attention"} if decoder else {})}
    names["DenseReluDense"] = "mlp"
    projections = {"q": "query", "k": "key", "v": "value", "o": "output", "wo": "down"}
    projections |= {"wi_0": "gate", "wi_1": "up"} if config.gated else {"wi": "up"}
    table = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    rules = [
        same(table, f"{ours}mixins.positions.table.weight"),
        same(f"{theirs}.final_layer_norm.weight", f"{ours}transformer.final_norm.weight"),
    ]
    for number, (their_name, name) in enumerate(names.items()):
        block, layer = f"{theirs}.block.{{i}}.layer.{number}", f"{ours}transformer.layers.{{i}}.{name}"
        rules.append(same(f"{block}.layer_norm.weight", f"{layer}_residual.input_norm.weight"))
        rules += [same(f"{block}.{their_name}.{a}.weight", f"{layer}.{b}.weight") for a, b in projections.items()]
    return rules


FAMILY = Family(
    config=T5Config,
    architectures=(
        "T5ForConditionalGeneration",
        "T5Model",
        "T5EncoderModel",
        "T5ForSequenceClassification",
        "T5ForTokenClassification",
        "T5ForQuestionAnswering",
    ),
    build=build,
    weights=weights,
    presets={
        "t5-small": Preset(config={}, parameters=60_506_624),
        "t5-base": Preset(
            config={"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}, parameters=222_903_552
        ),
        "t5-large": Preset(
            config={"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16}, parameters=737_668_096
        ),
        "t5-v1_1-small": Preset(
            config=VERSION_1_1 | {"d_ff": 1024, "num_layers": 8, "num_heads": 6}, parameters=76_961_152
        ),
        "t5-v1_1-base": Preset(
            config=VERSION_1_1 | {"d_model": 768, "num_layers": 12, "num_heads": 12}, parameters=247_577_856
        ),
    },
)
