"""P-tuning (Liu et al. 2021): a prompt that a small network makes from trained embeddings, which trains more evenly.

Changes: what prompt tuning does; `fold()` gives the prompt that was learned as a plain one, for inference.
Hooks: `PromptMixin`'s, those of prompt tuning.
Parameters: `embedding.weight` `[prompt_len, h]`; `encoder.*`, an MLP of three layers, or with `encoder="lstm"` a
bidirectional LSTM and an MLP of two.
"""

from itertools import pairwise
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn

from swissarmy.core.config import report, size_problems
from swissarmy.core.errors import nearest
from swissarmy.mixins.prompt_tuning import PromptMixin, PromptTuningMixin

Encoder = Literal["mlp", "lstm"]


@final
class LSTMEncoder(nn.Module):
    """What the paper uses: neighbours in the prompt know of each other."""

    def __init__(self, hidden_size: int, encoder_size: int) -> None:
        """Make the LSTM, of two layers, and the MLP behind it."""
        super().__init__()
        self.lstm = nn.LSTM(hidden_size, encoder_size, num_layers=2, bidirectional=True, batch_first=True)
        self.mlp = _mlp(2 * encoder_size, 2 * encoder_size, hidden_size)

    def forward(self, embeddings: Tensor) -> Tensor:
        """`[n, h]` to `[n, h]`."""
        prompt: Tensor = self.mlp(self.lstm(embeddings)[0])
        return prompt


@final
class PTuningMixin(PromptMixin):
    """A prompt behind an encoder."""

    def __init__(
        self,
        hidden_size: int,
        *,
        prompt_len: int = 16,
        encoder: Encoder = "mlp",
        encoder_size: int | None = None,
        has_positions: bool = True,
        reaches_decoder: bool = False,
    ) -> None:
        """Make embeddings and encoder.

        Args:
            hidden_size: The model's width.
            prompt_len: How many positions the prompt has.
            encoder: `mlp`, or `lstm`.
            encoder_size: The width inside the encoder; the model's when `None`.
            has_positions: As for `PromptTuningMixin`.
            reaches_decoder: As for `PromptTuningMixin`.

        Raises:
            ConfigError: Sizes or an encoder that are none.
        """
        super().__init__(prompt_len, has_positions=has_positions, reaches_decoder=reaches_decoder)
        size = hidden_size if encoder_size is None else encoder_size
        problems = [*size_problems(encoder_size=size)]
        if encoder not in get_args(Encoder):
            near = nearest(str(encoder), get_args(Encoder))
            problems.append(f"encoder={encoder!r} is unknown.{near} There are: 'mlp', 'lstm'")
        report(f"{type(self).__name__}:", problems)
        self.options = {"encoder": encoder, "encoder_size": encoder_size}
        self.embedding = nn.Embedding(prompt_len, hidden_size)
        self.encoder: nn.Module = (
            LSTMEncoder(hidden_size, size) if encoder == "lstm" else _mlp(hidden_size, size, size, hidden_size)
        )

    @property
    def saved_options(self) -> dict[str, Any]:
        """What it was made with."""
        return {**super().saved_options, **self.options}

    def make_prompt(self) -> Tensor:
        """What the encoder gives, `[prompt_len, h]`."""
        prompt: Tensor = self.encoder(self.embedding.weight)
        return prompt

    @torch.no_grad()
    def fold(self) -> PromptTuningMixin:
        """The plain prompt that does the same."""
        prompt = self.make_prompt()
        plain = PromptTuningMixin(prompt.shape[1], **super().saved_options).to(prompt)
        plain.embedding.weight.copy_(prompt)
        return plain


def _mlp(*sizes: int) -> nn.Sequential:
    """Linear layers of these sizes, with ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
