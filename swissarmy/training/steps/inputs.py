"""From a batch to the keywords that a model is called with."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from swissarmy.backbone.model import Model, iterate_models
from swissarmy.core.errors import HookCallError
from swissarmy.nn.masks import Causal, Documents, Full, PrefixLM

NOT_FOR_MODELS = ("labels", "loss_mask", "targets", "document_ids", "sample_ids")
"""What a batch holds beside them."""


def model_inputs(batch: Mapping[str, Tensor], model: Model) -> dict[str, Any]:
    """Everything that the model takes; positions as it counts them, and packed documents kept apart.

    Args:
        batch: From the stock collators.
        model: Whose first part reads the batch.
    """
    inputs: dict[str, Any] = {key: value for key, value in batch.items() if key not in NOT_FOR_MODELS}
    _, reader = next(iter(iterate_models(model)))
    if "token_type_ids" in inputs and "token_type_ids" not in reader.accepted:
        del inputs["token_type_ids"]  # the collator cannot know which models tell the texts of a pair apart
    if "position_ids" in batch:
        inputs["position_ids"] = batch["position_ids"] + reader.first_position
    if "document_ids" in batch:
        natural = Causal() if reader.config.causal else Full()
        inputs["attention_mask"] = natural & Documents(batch["document_ids"])
    if "prefix_lengths" in batch:
        inputs["attention_mask"] = PrefixLM(inputs.pop("prefix_lengths"))
    return inputs


def needed(batch: Mapping[str, Tensor], *names: str) -> Tensor:
    """The first of some entries that a batch has.

    Raises:
        HookCallError: It has none of them.
    """
    for name in names:
        if name in batch:
            return batch[name]
    raise HookCallError(f"this step needs a batch with {' or '.join(names)}; this one has {', '.join(sorted(batch))}.")
