"""Forward steps whose loss is of tokens: the next one, hidden ones, or those of a target.

Each gives the sum of the losses of all scored tokens in nats, their number, and how often the likeliest was right.
Shapes: b rows, s positions, m positions of a target.
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from swissarmy.backbone.model import Model, iterate_models
from swissarmy.core.errors import ConfigError
from swissarmy.data.samples.examples import IGNORED
from swissarmy.nn.token_losses import TokenLosses
from swissarmy.training.steps.inputs import model_inputs, needed
from swissarmy.training.window import nats_per_token

Metrics = dict[str, tuple[Tensor, Tensor]]


@nats_per_token
def causal_lm_step(batch: Mapping[str, Tensor], model: Model) -> tuple[Tensor, Tensor, Metrics]:
    """Predict each next token (Radford et al. 2018).

    Args:
        batch: `input_ids` `[b, s]`, and if there are: `loss_mask` (whether a token is to be predicted, beside it),
            `padding_mask`, `position_ids`, and of packed rows `document_ids`, all `[b, s]`.
        model: A causal one.
    """
    ids = needed(batch, "input_ids")
    scored = batch["loss_mask"].bool() if "loss_mask" in batch else batch.get("padding_mask", ids >= 0).bool()
    targets = F.pad(ids.masked_fill(~scored, IGNORED)[:, 1:], (0, 1), value=IGNORED)
    return _token_loss(batch, model, targets)


@nats_per_token
def masked_lm_step(batch: Mapping[str, Tensor], model: Model) -> tuple[Tensor, Tensor, Metrics]:
    """Predict hidden tokens from both sides (Devlin et al. 2019); the `masked_lm` objective hides them.

    Args:
        batch: `input_ids`, `targets` (-100 where nothing was hidden), and if there are `padding_mask`,
            `token_type_ids`, `position_ids`, all `[b, s]`.
        model: One with a masked-LM head.
    """
    return _token_loss(batch, model, needed(batch, "targets", "labels"))


@nats_per_token
def seq2seq_step(batch: Mapping[str, Tensor], model: Model) -> tuple[Tensor, Tensor, Metrics]:
    """Predict a target from a source (Sutskever et al. 2014; span corruption: Raffel et al. 2020).

    Args:
        batch: `input_ids` and `padding_mask` `[b, s]`; `decoder_input_ids`, `decoder_padding_mask` and `labels`,
            -100 where nothing is scored, `[b, m]`.
        model: An encoder-decoder.
    """
    return _token_loss(batch, model, needed(batch, "labels", "targets"))


@nats_per_token
def blank_infilling_step(batch: Mapping[str, Tensor], model: Model) -> tuple[Tensor, Tensor, Metrics]:
    """Predict spans that were cut out, one token after the other (GLM, Du et al. 2022).

    Args:
        batch: As the `blank_infilling` objective makes it: `input_ids`, `targets`, `position_ids` `[b, s]`, and
            `prefix_lengths` `[b]`, before which everything is seen from everywhere.
        model: A causal one.
    """
    return _token_loss(batch, model, needed(batch, "targets"))


def check_step(forward_step: Any, model: Model) -> None:
    """Whether a model is one that a forward step is for.

    Raises:
        ConfigError: It would see what it is to predict.
    """
    if forward_step is causal_lm_step and any(not plain.config.causal for _, plain in iterate_models(model)):
        raise ConfigError(
            "causal_lm predicts each next token, and this model sees it: its attention goes both ways (causal=False). "
            "Train it with masked_lm, or with seq2seq where it has a decoder."
        )


def _token_loss(batch: Mapping[str, Tensor], model: Model, targets: Tensor) -> tuple[Tensor, Tensor, Metrics]:
    losses: TokenLosses = model(**model_inputs(batch, model), targets=targets)[0]
    count = (targets != IGNORED).sum()
    return losses.total, count, {"accuracy": (losses.correct.sum(), count)}
