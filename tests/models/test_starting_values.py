"""New weights are as wide as the configuration says, in the backbone and in the parts of every family."""

import pytest
import torch
from torch import nn

import swissarmy as sat
from swissarmy.models._family import build_model
from swissarmy.nn.norms import RMSNorm
from swissarmy.testing import TINY_CONFIGS

HEADS = {
    "gpt2": "GPT2ForTokenClassification",
    "llama": "LlamaForTokenClassification",
    "gemma3_text": "Gemma3TextForSequenceClassification",
    "bert": "BertForPreTraining",
    "roberta": "RobertaForTokenClassification",
    "vit": "ViTForImageClassification",
    "deit": "DeiTForImageClassificationWithTeacher",
}
DEVIATION = 0.07


@pytest.mark.parametrize("family", HEADS)
def test_weights_are_normal_biases_zero_and_norms_scale_nothing(family: str) -> None:
    torch.manual_seed(0)
    model = build_model(
        {
            "model_type": family,
            **TINY_CONFIGS[family],
            "architectures": [HEADS[family]],
            "initializer_range": DEVIATION,
        }
    )
    assert isinstance(model, sat.BaseModel)
    shrunk = model.transformer.config.scale_residual_init
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.LayerNorm | RMSNorm):
                sample = torch.randn(3, len(module.weight))
                expected = nn.functional.layer_norm if isinstance(module, nn.LayerNorm) else nn.functional.rms_norm
                torch.testing.assert_close(module(sample), expected(sample, (len(module.weight),), eps=module.eps))
            elif name == "bias":
                assert not parameter.any()
            elif not (shrunk and module_name.endswith(("attention.output", "mlp.down"))):
                spread = 5 * DEVIATION / (2 * parameter.numel()) ** 0.5
                assert abs(parameter.square().mean().sqrt().item() - DEVIATION) < spread, f"{module_name}.{name}"
