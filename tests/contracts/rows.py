"""The rows of the matrix, and what cannot be combined, with the reason: everything else is generated from these."""

from collections.abc import Iterator, Mapping
from itertools import combinations

import swissarmy as sat
from swissarmy.testing import TINY_CONFIGS, Addition

TWO_ADAPTERS = {
    "a": {"class": "AdapterMixin", "options": {"bottleneck_size": 3}},
    "b": {"class": "CompacterMixin", "options": {}},
}

ROWS: Mapping[str, Addition] = {
    "mixture of experts": Addition(sat.MixtureOfExpertsMixin, {"num_experts": 3}),
    "adapters": Addition(sat.AdapterMixin, same_at_start=True),
    "AdapterFusion": Addition(sat.AdapterFusionMixin, {"adapters": TWO_ADAPTERS}, same_at_start=True),
    "ALiBi": Addition(sat.ALiBiMixin),
    "attention soft-cap": Addition(sat.AttentionSoftcapMixin, {"cap": 2.0}),
    "BitFit": Addition(sat.BitFitMixin, same_at_start=True),
    "Compacter": Addition(sat.CompacterMixin, same_at_start=True),
    "DoRA, PiSSA": Addition(sat.LoRAMixin, {"r": 2, "dora": True, "init": "pissa"}, same_at_start=True),
    "embedding scale": Addition(sat.EmbeddingScaleMixin, {"scale": 0.5}),
    "FFADD": Addition(sat.FFADDMixin, {"num_neurons": 3}, same_at_start=True),
    "hidden states": Addition(sat.HiddenStatesMixin, same_at_start=True),
    "IA3": Addition(sat.IA3Mixin, {"targets": "*"}, same_at_start=True),
    "key-value cache": Addition(sat.CachedAutoRegressiveMixin, same_at_start=True),
    "layer scaling": Addition(sat.LayerScalingMixin, same_at_start=True),
    "logit soft-cap": Addition(sat.LogitSoftcapMixin, {"cap": 3.0}),
    "LoRA": Addition(sat.LoRAMixin, {"r": 2, "targets": "*"}, same_at_start=True),
    "LoReFT": Addition(sat.LoReFTMixin, {"rank": 2, "first": 3}),
    "P-tuning": Addition(sat.PTuningMixin, {"prompt_len": 2}),
    "prefix-tuning": Addition(sat.PrefixTuningMixin, {"prefix_len": 3}),
    "prefix-tuning, reparametrised": Addition(
        sat.PrefixTuningMixin, {"prefix_len": 2, "encoder_size": 5, "shift_positions": True}
    ),
    "prompt tuning": Addition(sat.PromptTuningMixin, {"prompt_len": 3}),
    "QK-norm": Addition(sat.QKNormMixin),
    "reduced weights": Addition(sat.ReducedWeightsMixin, {"kind": "fp16"}),
    "relative position bias": Addition(sat.RelativePositionBiasMixin, {"num_buckets": 8}),
    "rotary": Addition(sat.RotaryMixin),
    "sliding window": Addition(sat.SlidingWindowMixin, {"window": 4}),
    "token types": Addition(sat.TokenTypesMixin),
    "VeRA": Addition(sat.VeRAMixin, {"r": 3}, same_at_start=True),
}
"""A mixin by the name of its method, as it is put to the checks; of two, the upper one is added first."""

NOT_ON_TOP: Mapping[str, str] = {
    "ClassificationHeadMixin": "replaces the head; tested with the families that have it",
    "InterpolatedPositionsMixin": "replaces the positions of ViT; tested with it",
    "LMHeadMixin": "replaces the head; tested with the families that have it",
    "LoRABankMixin": "bundles adapters that were trained before; tested in tests/mixins/test_lora_bank.py",
    "LearnedPositionsMixin": "replaces the positions; tested with the families that have them",
    "MLMHeadMixin": "replaces the head; tested with the families that have it",
    "MLPHeadMixin": "replaces the head; tested in tests/mixins/test_mlp_head.py",
    "MergeableMixin": "is what mixins with merge and unmerge have in common, and none by itself",
    "NoHeadMixin": "replaces the head; tested with the families that have it",
    "PatchEmbeddingMixin": "replaces the word embedding; tested with ViT",
    "PoolerMixin": "replaces the head; tested with the families that have it",
}
"""Exported mixins that are no row, and why."""

FAMILIES = tuple(sorted(TINY_CONFIGS))

EXCLUDED: Mapping[tuple[str, str], str] = {
    ("rotary", "llama"): "it has rotary positions already, and a key is rotated once",
    ("rotary", "gemma3_text"): "it has rotary positions already, and a key is rotated once",
    ("token types", "vit"): "a picture has no first and second text to tell apart",
    ("token types", "deit"): "a picture has no first and second text to tell apart",
    ("P-tuning", "prompt tuning"): "a model takes one prompt; two are refused",
    ("mixture of experts", "reduced weights"): "the experts' own weights are reduced too, and have no gradient then",
}
"""A row and a family, or two rows."""

NOT_CHECKED: Mapping[tuple[str, str], str] = {
    (
        "reduced weights",
        "FSDP2 x 2",
    ): "its packed weights belong to the process that packed them; refused with that reason",
    (
        "reduced weights",
        "TP x 2",
    ): "its packed weights belong to the process that packed them; refused with that reason",
    (
        "reduced weights",
        "CP x 2",
    ): "its packed weights belong to the process that packed them; refused with that reason",
}
"""A row and a check."""


def singles() -> Iterator[tuple[str, str]]:
    """Family and row."""
    for row in ROWS:
        yield from ((family, row) for family in FAMILIES if (row, family) not in EXCLUDED)


def pairs() -> Iterator[tuple[str, str, str]]:
    """Family and two rows of different classes."""
    for first, second in combinations(ROWS, 2):
        if ROWS[first].kind is ROWS[second].kind or {(first, second), (second, first)} & set(EXCLUDED):
            continue
        for family in FAMILIES:
            if (first, family) not in EXCLUDED and (second, family) not in EXCLUDED:
                yield family, first, second
