"""Starting values of new weights, as GPT-2, BERT and ViT have them."""

from torch import nn

from swissarmy.nn.norms import RMSNorm


def start_normal(module: nn.Module, deviation: float) -> None:
    """Draw the weights of a module, and of all inside it, from a normal distribution; biases are zero.

    Norms stay what they are, which is no scaling at all.
    """
    for owner in module.modules():
        if isinstance(owner, nn.LayerNorm | RMSNorm):
            continue
        for name, parameter in owner.named_parameters(recurse=False):
            if name == "bias":
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=deviation)
