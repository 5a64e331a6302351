"""Forward steps whose loss is of labels: of texts, and of pictures.

Shapes: b rows, s positions, k labels.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swissarmy.backbone.model import Model, iterate_models
from swissarmy.core.errors import HookCallError
from swissarmy.data.samples.examples import IGNORED
from swissarmy.mixins.heads import ClassificationHeadMixin
from swissarmy.nn.precision import precise
from swissarmy.training.steps.inputs import model_inputs, needed

Metrics = dict[str, tuple[Tensor, Tensor]]


def classification_step(batch: Mapping[str, Tensor], model: Model) -> tuple[Tensor, Tensor, Metrics]:
    """Cross-entropy of labels, or the squared error where labels are real numbers.

    Args:
        batch: What the model is called with, such as `input_ids` `[b, s]` and `padding_mask`, and `labels`: `[b]` of
            rows, or `[b, s]` of tokens; -100 where nothing is scored.
        model: One whose head gives scores `[b, k]`, or `[b, s, k]`.

    Returns:
        The sum of the losses, how many labels were scored, and how many were right.

    Raises:
        HookCallError: The head gives scores of another shape, or of fewer classes.
    """
    labels = needed(batch, "labels")
    scores = model(**model_inputs(batch, model))[0]
    _check(scores, labels)
    wide = precise(scores)
    if labels.is_floating_point():
        count = torch.tensor(labels.numel(), device=labels.device)
        return F.mse_loss(wide.view_as(labels), labels.to(wide.dtype), reduction="sum"), count, {}
    here = labels != IGNORED
    _check_on_cpu(labels, wide.shape[-1])
    loss = F.cross_entropy(wide.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    right = ((wide.argmax(dim=-1) == labels) & here).sum()
    return loss, here.sum(), {"accuracy": (right, here.sum())}


def image_classification_step(batch: Mapping[str, Tensor], model: Model) -> tuple[Tensor, Tensor, Metrics]:
    """The same for pictures: `pixel_values` `[b, c, h, w]` and `labels` `[b]`."""
    needed(batch, "pixel_values")
    return classification_step(batch, model)


def known_labels(forward_step: Any, model: Model) -> int | None:
    """How many classes the model's head knows, where the forward step is one of those here; else `None`."""
    if forward_step not in (classification_step, image_classification_step):
        return None
    *_, (_, last) = iterate_models(model)
    heads = (mixin for mixin in last.mixins.values() if isinstance(mixin, ClassificationHeadMixin))
    return next((head.num_labels for head in heads), None)


def _check_on_cpu(labels: Tensor, classes: int) -> None:
    """Whether there are scores for all classes; on other devices, to look would be to wait for them."""
    if labels.device.type == "cpu" and labels.numel() and int(labels.max()) >= classes:
        raise HookCallError(f"there is a label {int(labels.max())}, and the model has {classes} classes, from 0 on.")


def _check(scores: Any, labels: Tensor) -> None:
    """Whether there is a row of scores for each label."""
    shape = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    fits = isinstance(scores, Tensor) and scores.shape[:-1] == labels.shape
    fits = fits or (isinstance(scores, Tensor) and labels.is_floating_point() and scores.numel() == labels.numel())
    if not fits:
        raise HookCallError(
            f"the model's head gives {shape} for labels {list(labels.shape)}: classification needs a head for labels "
            "(an architecture ...ForSequenceClassification, or sat.ClassificationHeadMixin)."
        )
