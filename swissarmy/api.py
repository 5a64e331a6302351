"""The public names, imported from where they live; `swissarmy` hands them on."""

from swissarmy.backbone.composite import CompositeModel
from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.encoder_decoder import EncoderDecoderModel
from swissarmy.backbone.model import BaseModel
from swissarmy.core.errors import (
    CheckpointError,
    ConfigError,
    HookCallError,
    HookConflictError,
    HookDefinitionError,
    MissingExtraError,
    SwissArmyError,
    TokenizerError,
)
from swissarmy.core.hooks import HookContext, non_conflict, replaceable
from swissarmy.core.mixin import BaseMixin
from swissarmy.generation.autoregressive_sampling import fill_sequence, filling_sequence
from swissarmy.generation.beam_search import BeamSearchStrategy, gnmt_length_penalty, power_length_penalty
from swissarmy.generation.perplexity import Perplexity, evaluate_perplexity
from swissarmy.generation.speculative import GuessingStrategy, PromptLookupStrategy, SpeculativeStrategy
from swissarmy.generation.strategies import GreedyStrategy, SamplingStrategy, Strategy, TokenStrategy
from swissarmy.generation.text import Generation, generate, generate_with_logprobs, stream
from swissarmy.interop.load import AutoModel, load
from swissarmy.interop.tokenizer import load_tokenizer
from swissarmy.mixins.alibi import ALiBiMixin
from swissarmy.mixins.cache import CachedAutoRegressiveMixin, CachedAutoregressiveMixin
from swissarmy.mixins.embedding_scale import EmbeddingScaleMixin
from swissarmy.mixins.heads import ClassificationHeadMixin, LMHeadMixin, MLMHeadMixin, NoHeadMixin, PoolerMixin
from swissarmy.mixins.hidden_states import HiddenStatesMixin
from swissarmy.mixins.learned_positions import LearnedPositionsMixin
from swissarmy.mixins.mixture_of_experts import MixtureOfExpertsMixin
from swissarmy.mixins.patch_embedding import InterpolatedPositionsMixin, PatchEmbeddingMixin
from swissarmy.mixins.prefix_tuning import PrefixTuningMixin
from swissarmy.mixins.qk_norm import QKNormMixin
from swissarmy.mixins.relative_position_bias import RelativePositionBiasMixin
from swissarmy.mixins.rotary import RotaryMixin
from swissarmy.mixins.sliding_window import SlidingWindowMixin
from swissarmy.mixins.softcap import AttentionSoftcapMixin, LogitSoftcapMixin
from swissarmy.mixins.token_types import TokenTypesMixin
from swissarmy.models._family import list_models
from swissarmy.nn.kv_cache import KVCache
from swissarmy.nn.masks import Causal, Dense, Documents, Full, Mask, Padding, PrefixLM, SlidingWindow
from swissarmy.nn.rotary import RopeParameters

__all__ = [
    "ALiBiMixin",
    "AttentionSoftcapMixin",
    "AutoModel",
    "BaseMixin",
    "BaseModel",
    "BeamSearchStrategy",
    "CachedAutoRegressiveMixin",
    "CachedAutoregressiveMixin",
    "Causal",
    "CheckpointError",
    "ClassificationHeadMixin",
    "CompositeModel",
    "ConfigError",
    "Dense",
    "Documents",
    "EmbeddingScaleMixin",
    "EncoderDecoderModel",
    "Full",
    "Generation",
    "GreedyStrategy",
    "GuessingStrategy",
    "HiddenStatesMixin",
    "HookCallError",
    "HookConflictError",
    "HookContext",
    "HookDefinitionError",
    "InterpolatedPositionsMixin",
    "KVCache",
    "LMHeadMixin",
    "LearnedPositionsMixin",
    "LogitSoftcapMixin",
    "MLMHeadMixin",
    "Mask",
    "MissingExtraError",
    "MixtureOfExpertsMixin",
    "NoHeadMixin",
    "Padding",
    "PatchEmbeddingMixin",
    "Perplexity",
    "PoolerMixin",
    "PrefixLM",
    "PrefixTuningMixin",
    "PromptLookupStrategy",
    "QKNormMixin",
    "RelativePositionBiasMixin",
    "RopeParameters",
    "RotaryMixin",
    "SamplingStrategy",
    "SlidingWindow",
    "SlidingWindowMixin",
    "SpeculativeStrategy",
    "Strategy",
    "SwissArmyError",
    "TokenStrategy",
    "TokenTypesMixin",
    "TokenizerError",
    "TransformerConfig",
    "evaluate_perplexity",
    "fill_sequence",
    "filling_sequence",
    "generate",
    "generate_with_logprobs",
    "gnmt_length_penalty",
    "list_models",
    "load",
    "load_tokenizer",
    "non_conflict",
    "power_length_penalty",
    "replaceable",
    "stream",
]
