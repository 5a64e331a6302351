"""Stock forward steps: what a batch's loss is, as sums and counts."""

from collections.abc import Mapping

from swissarmy.training.steps.labels import classification_step, image_classification_step
from swissarmy.training.steps.tokens import blank_infilling_step, causal_lm_step, masked_lm_step, seq2seq_step
from swissarmy.training.window import ForwardStep

STEPS: Mapping[str, ForwardStep] = {
    "causal_lm": causal_lm_step,
    "masked_lm": masked_lm_step,
    "seq2seq": seq2seq_step,
    "span_corruption": seq2seq_step,
    "blank_infilling": blank_infilling_step,
    "classification": classification_step,
    "image_classification": image_classification_step,
}
"""The step of each objective that the command line knows."""
