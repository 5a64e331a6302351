"""The public names, imported from where they live; `swissarmy` hands them on.

Those of training come when the first of them is used: with them come torch's packages for many processes, which take
as long to import as all else.
"""

import importlib
from typing import TYPE_CHECKING, Any

from swissarmy.backbone.composite import CompositeModel
from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.encoder_decoder import EncoderDecoderModel
from swissarmy.backbone.merging import MergeableMixin, merge_mixin, unmerge_mixin
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
from swissarmy.core.mixin import BaseMixin, SharedDim
from swissarmy.data.build import Loaders, build_loaders
from swissarmy.data.config import DataConfig
from swissarmy.data.loading.batches import LoaderError
from swissarmy.data.loading.loader import FingerprintError, Loader
from swissarmy.data.objectives.collator import objective_collator
from swissarmy.data.objectives.options import ObjectiveOptions
from swissarmy.data.order.blend import Blend
from swissarmy.data.prepare import create_dataset
from swissarmy.data.samples.chat_encoder import ChatEncoder
from swissarmy.data.samples.encoders import (
    ClassificationEncoder,
    CompletionEncoder,
    Seq2SeqEncoder,
    TextEncoder,
    TokensEncoder,
)
from swissarmy.data.samples.examples import Examples
from swissarmy.data.samples.image_encoder import ImageEncoder
from swissarmy.data.samples.packing import Packed
from swissarmy.data.source import DataError, RecordError, Source
from swissarmy.data.sources.binary import BinaryDataset
from swissarmy.data.sources.open import open_source, open_stream
from swissarmy.data.sources.stream import Stream, StreamSource
from swissarmy.data.sources.wrapped import Wrapped, as_source
from swissarmy.data.tokenize import write_tokens
from swissarmy.generation.autoregressive_sampling import fill_sequence, filling_sequence
from swissarmy.generation.beam_search import BeamSearchStrategy, gnmt_length_penalty, power_length_penalty
from swissarmy.generation.constraints import Constraint, json_schema_constraint, regex_constraint
from swissarmy.generation.contrastive import ContrastiveStrategy
from swissarmy.generation.parallel_filling import IterativeEntropyFilterStrategy, fill_sequence_in_parallel
from swissarmy.generation.perplexity import Perplexity, evaluate_perplexity
from swissarmy.generation.speculative import GuessingStrategy, PromptLookupStrategy, SpeculativeStrategy
from swissarmy.generation.strategies import GreedyStrategy, SamplingStrategy, Strategy, TokenStrategy
from swissarmy.generation.text import Generation, generate, generate_with_logprobs, stream
from swissarmy.interop.adapter import load_adapter
from swissarmy.interop.load import AutoModel, load
from swissarmy.interop.tokenizer import load_tokenizer
from swissarmy.mixins.adapter import AdapterConfig, AdapterMixin
from swissarmy.mixins.adapter_fusion import AdapterFusionMixin, fuse_adapters
from swissarmy.mixins.alibi import ALiBiMixin
from swissarmy.mixins.bitfit import BitFitConfig, BitFitMixin
from swissarmy.mixins.cache import CachedAutoRegressiveMixin, CachedAutoregressiveMixin
from swissarmy.mixins.compacter import CompacterConfig, CompacterMixin
from swissarmy.mixins.embedding_scale import EmbeddingScaleMixin
from swissarmy.mixins.ffadd import FFADDConfig, FFADDMixin
from swissarmy.mixins.heads import ClassificationHeadMixin, LMHeadMixin, MLMHeadMixin, NoHeadMixin, PoolerMixin
from swissarmy.mixins.hidden_states import HiddenStatesMixin
from swissarmy.mixins.ia3 import IA3Config, IA3Mixin
from swissarmy.mixins.layer_scaling import LayerScalingConfig, LayerScalingMixin
from swissarmy.mixins.learned_positions import LearnedPositionsMixin
from swissarmy.mixins.lora import LoRAConfig, LoRAMixin
from swissarmy.mixins.lora_bank import BankConfig, LoRABankMixin, bundle_adapters
from swissarmy.mixins.mixture_of_experts import MixtureOfExpertsMixin
from swissarmy.mixins.mlp_head import MLPHeadMixin
from swissarmy.mixins.p_tuning import PTuningMixin
from swissarmy.mixins.patch_embedding import InterpolatedPositionsMixin, PatchEmbeddingMixin
from swissarmy.mixins.prefix_tuning import PrefixTuningMixin
from swissarmy.mixins.prompt_tuning import PromptTuningMixin
from swissarmy.mixins.qk_norm import QKNormMixin
from swissarmy.mixins.reduced_weights import ReducedWeightsMixin
from swissarmy.mixins.reft import LoReFTConfig, LoReFTMixin
from swissarmy.mixins.relative_position_bias import RelativePositionBiasMixin
from swissarmy.mixins.rotary import RotaryMixin
from swissarmy.mixins.sliding_window import SlidingWindowMixin
from swissarmy.mixins.softcap import AttentionSoftcapMixin, LogitSoftcapMixin
from swissarmy.mixins.token_types import TokenTypesMixin
from swissarmy.mixins.vera import VeRAConfig, VeRAMixin
from swissarmy.models._distillation import DistillationModel, DistillationOutput
from swissarmy.models._family import list_models
from swissarmy.nn.kv_cache import KVCache
from swissarmy.nn.masks import Causal, Dense, Documents, Full, Mask, Padding, PrefixLM, SlidingWindow
from swissarmy.nn.rotary import RopeParameters
from swissarmy.nn.token_losses import TokenLosses

if TYPE_CHECKING:
    from swissarmy.training.callbacks.base import Callback, Run
    from swissarmy.training.config import TrainConfig
    from swissarmy.training.spikes import TrainingError
    from swissarmy.training.steps.distillation import distillation_step
    from swissarmy.training.steps.labels import classification_step, image_classification_step
    from swissarmy.training.steps.tokens import blank_infilling_step, causal_lm_step, masked_lm_step, seq2seq_step
    from swissarmy.training.train import TrainResult, train
    from swissarmy.training.window import nats_per_token

_OF_TRAINING = {
    "Callback": "callbacks.base",
    "Run": "callbacks.base",
    "TrainConfig": "config",
    "TrainResult": "train",
    "TrainingError": "spikes",
    "blank_infilling_step": "steps.tokens",
    "causal_lm_step": "steps.tokens",
    "classification_step": "steps.labels",
    "distillation_step": "steps.distillation",
    "image_classification_step": "steps.labels",
    "masked_lm_step": "steps.tokens",
    "nats_per_token": "window",
    "seq2seq_step": "steps.tokens",
    "train": "train",
}
"""In which of its modules a name is."""


def __getattr__(name: str) -> Any:
    """A name of training."""
    if name not in _OF_TRAINING:
        raise AttributeError(f"module 'swissarmy.api' has no attribute '{name}'")
    return getattr(importlib.import_module(f"swissarmy.training.{_OF_TRAINING[name]}"), name)


__all__ = [
    "ALiBiMixin",
    "AdapterConfig",
    "AdapterFusionMixin",
    "AdapterMixin",
    "AttentionSoftcapMixin",
    "AutoModel",
    "BankConfig",
    "BaseMixin",
    "BaseModel",
    "BeamSearchStrategy",
    "BinaryDataset",
    "BitFitConfig",
    "BitFitMixin",
    "Blend",
    "CachedAutoRegressiveMixin",
    "CachedAutoregressiveMixin",
    "Callback",
    "Causal",
    "ChatEncoder",
    "CheckpointError",
    "ClassificationEncoder",
    "ClassificationHeadMixin",
    "CompacterConfig",
    "CompacterMixin",
    "CompletionEncoder",
    "CompositeModel",
    "ConfigError",
    "Constraint",
    "ContrastiveStrategy",
    "DataConfig",
    "DataError",
    "Dense",
    "DistillationModel",
    "DistillationOutput",
    "Documents",
    "EmbeddingScaleMixin",
    "EncoderDecoderModel",
    "Examples",
    "FFADDConfig",
    "FFADDMixin",
    "FingerprintError",
    "Full",
    "Generation",
    "GreedyStrategy",
    "GuessingStrategy",
    "HiddenStatesMixin",
    "HookCallError",
    "HookConflictError",
    "HookContext",
    "HookDefinitionError",
    "IA3Config",
    "IA3Mixin",
    "ImageEncoder",
    "InterpolatedPositionsMixin",
    "IterativeEntropyFilterStrategy",
    "KVCache",
    "LMHeadMixin",
    "LayerScalingConfig",
    "LayerScalingMixin",
    "LearnedPositionsMixin",
    "LoRABankMixin",
    "LoRAConfig",
    "LoRAMixin",
    "LoReFTConfig",
    "LoReFTMixin",
    "Loader",
    "LoaderError",
    "Loaders",
    "LogitSoftcapMixin",
    "MLMHeadMixin",
    "MLPHeadMixin",
    "Mask",
    "MergeableMixin",
    "MissingExtraError",
    "MixtureOfExpertsMixin",
    "NoHeadMixin",
    "ObjectiveOptions",
    "PTuningMixin",
    "Packed",
    "Padding",
    "PatchEmbeddingMixin",
    "Perplexity",
    "PoolerMixin",
    "PrefixLM",
    "PrefixTuningMixin",
    "PromptLookupStrategy",
    "PromptTuningMixin",
    "QKNormMixin",
    "RecordError",
    "ReducedWeightsMixin",
    "RelativePositionBiasMixin",
    "RopeParameters",
    "RotaryMixin",
    "Run",
    "SamplingStrategy",
    "Seq2SeqEncoder",
    "SharedDim",
    "SlidingWindow",
    "SlidingWindowMixin",
    "Source",
    "SpeculativeStrategy",
    "Strategy",
    "Stream",
    "StreamSource",
    "SwissArmyError",
    "TextEncoder",
    "TokenLosses",
    "TokenStrategy",
    "TokenTypesMixin",
    "TokenizerError",
    "TokensEncoder",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "TransformerConfig",
    "VeRAConfig",
    "VeRAMixin",
    "Wrapped",
    "as_source",
    "blank_infilling_step",
    "build_loaders",
    "bundle_adapters",
    "causal_lm_step",
    "classification_step",
    "create_dataset",
    "distillation_step",
    "evaluate_perplexity",
    "fill_sequence",
    "fill_sequence_in_parallel",
    "filling_sequence",
    "fuse_adapters",
    "generate",
    "generate_with_logprobs",
    "gnmt_length_penalty",
    "image_classification_step",
    "json_schema_constraint",
    "list_models",
    "load",
    "load_adapter",
    "load_tokenizer",
    "masked_lm_step",
    "merge_mixin",
    "nats_per_token",
    "non_conflict",
    "objective_collator",
    "open_source",
    "open_stream",
    "power_length_penalty",
    "regex_constraint",
    "replaceable",
    "seq2seq_step",
    "stream",
    "train",
    "unmerge_mixin",
    "write_tokens",
]
