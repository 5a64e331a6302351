"""Prompt tuning (Lester et al. 2021; for images VPT, Jia et al. 2022): trained embeddings before those of the tokens.

Changes: tokens attend to `prompt_len` more positions, which go through all layers as tokens do. The caller sees the
tokens alone: what the model gives has the shapes that it has without a prompt, in cached decoding too; only a decoder
attends to the prompt in its encoder's output.
How: the prompt goes beside the tokens. In a causal model it does not depend on them; each layer takes it first, and its
keys and values are put before the tokens' own, in a generation once for all steps. Otherwise each layer takes both at
once, so that mixins inside see both.
Hooks: `position_embedding_forward`, `layer_forward`, `final_forward` (wrap), `attention_fn` (wraps, stage `extend`).
Parameters: `embedding.weight` `[prompt_len, h]`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.core.config import report, size_problems
from swissarmy.core.errors import ConfigError, HookCallError
from swissarmy.core.hooks import RESERVED, Hook, non_conflict
from swissarmy.core.mixin import BaseMixin, MixinHost
from swissarmy.core.outputs import Outputs
from swissarmy.nn.masks import Causal, Documents, Full, Mask

NOWHERE = 2**31 - 1
"""What stands in `position_ids` for a prompt, for mixins that choose tokens by position."""


class Prompt(NamedTuple):
    """What all layers know of the prompt."""

    states: Tensor
    """What the first layer is given, `[1, n, h]`."""
    outputs: dict[str, Any]
    """What the position hooks hand to all layers for the prompt; of a bidirectional model, for prompt and tokens."""


@final
@dataclass
class PromptKeys:
    """A layer's keys and values of the prompt, `[b, kv_heads, n, d]`, once they are made."""

    key: Tensor | None = None
    value: Tensor | None = None


@final
@dataclass(frozen=True, eq=False)
class Prompted(Mask):
    """`inner` for the tokens, who also see all of the prompt, as it does; the prompt sees what the first token sees."""

    inner: Mask
    num_keys: int

    @property
    def batch_size(self) -> int:
        return self.inner.batch_size

    @property
    def num_heads(self) -> int:
        return self.inner.num_heads

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        inside = self.inner.visible(b, h, (q - self.num_keys).clamp(min=0), (k - self.num_keys).clamp(min=0))
        return (k < self.num_keys) | inside

    def check(self, q_len: int, k_len: int) -> None:
        self.inner.check(q_len - self.num_keys, k_len - self.num_keys)


class PromptMixin(BaseMixin, ABC):
    """A prompt before the tokens; a subclass says what it is made from."""

    def __init__(self, prompt_len: int, *, has_positions: bool, reaches_decoder: bool) -> None:
        """Set what all prompts have.

        Args:
            prompt_len: How many positions it has.
            has_positions: Whether these are counted: the prompt has the first, and the tokens those after it.
            reaches_decoder: Whether the model's output has the prompt in front, for a decoder to attend to.

        Raises:
            ConfigError: A length that is none.
        """
        super().__init__()
        report(f"{type(self).__name__}:", size_problems(prompt_len=prompt_len))
        self.prompt_len, self.has_positions, self.reaches_decoder = prompt_len, has_positions, reaches_decoder

    @abstractmethod
    def make_prompt(self) -> Tensor:
        """The prompt's embeddings, `[prompt_len, h]`."""

    @classmethod
    def suits(cls, config: Any) -> bool:
        """Not the decoder behind an encoder: there the encoder's input has the prompt."""
        return not config.cross_attention

    @classmethod
    def for_model(cls, model: MixinHost, **options: Any) -> Any:
        """The mixin with its sizes filled in; where there is a decoder behind an encoder, it sees the prompt too."""
        if any(part.config.cross_attention for part in model.parts.values()):
            options = {"reaches_decoder": True, **options}
        return super().for_model(model, **options)

    @classmethod
    def for_config(cls, config: TransformerConfig, **options: Any) -> Self:
        """The model's width; a prompt among image patches has no positions."""
        return cls(config.hidden_size, **{"has_positions": config.vocab_size > 0, **options})

    @property
    def saved_options(self) -> dict[str, Any]:
        """What it was made with, as far as all prompts have it."""
        return {
            "prompt_len": self.prompt_len,
            "has_positions": self.has_positions,
            "reaches_decoder": self.reaches_decoder,
        }

    @property
    def positions_before(self) -> int:
        """The prompt's own."""
        return self.prompt_len if self.has_positions else 0

    @non_conflict
    def position_embedding_forward(self, position_ids: Tensor, *, old_impl: Hook, **kw_args: Any) -> Tensor | None:
        """Make the prompt, with the positions that all mixins together give it, unless a cache remembers it."""
        is_own = "prompt_pass" in kw_args
        if not is_own and not _is_remembered(kw_args["mems"]):
            kw_args["output_cross_layer"]["prompt"] = self._prompt(position_ids, kw_args)
        positions: Tensor | None = old_impl(position_ids, **kw_args)
        return positions

    @non_conflict
    def layer_forward(self, hidden_states: Tensor, mask: Mask, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        """Run the layer for the prompt too."""
        if "prompt_pass" in kw_args:
            result: Tensor = old_impl(hidden_states, mask, **kw_args)
        elif kw_args["transformer"].config.causal:
            keys = self._keys(len(hidden_states), kw_args)
            result = old_impl(hidden_states, mask, **kw_args, prompt_keys=keys)
        else:
            result = self._together(hidden_states, mask, old_impl, kw_args)
        return result

    @non_conflict(stage="extend")
    def attention_fn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        dropout_fn: Any,
        cross_attention: bool = False,
        *,
        old_impl: Hook,
        **kw_args: Any,
    ) -> Tensor:
        """Keep the prompt's keys and values when it goes by, and put them before those of the tokens."""
        passing, keys = kw_args.get("prompt_pass"), kw_args.get("prompt_keys")
        if passing is not None and not cross_attention:
            passing.key, passing.value = (each[:, :, -self.prompt_len :] for each in (k, v))
        elif keys is not None and not cross_attention:
            k, v = torch.cat((keys.key.to(k.dtype), k), dim=2), torch.cat((keys.value.to(v.dtype), v), dim=2)
            mask = mask.with_prefix(self.prompt_len)
        context: Tensor = old_impl(q, k, v, mask, dropout_fn, cross_attention=cross_attention, **kw_args)
        return context

    @non_conflict
    def final_forward(self, hidden_states: Tensor, *, old_impl: Hook, **kw_args: Any) -> Any:
        """Give a decoder the prompt too."""
        if self.reaches_decoder:
            norm, states = kw_args["transformer"].final_norm, kw_args["prompt_states"]
            hidden_states = torch.cat((states if norm is None else norm(states), hidden_states), dim=1)
        return old_impl(hidden_states, **kw_args)

    def _prompt(self, position_ids: Tensor, kw_args: dict[str, Any]) -> Prompt:
        """The prompt as the first layer is given it: what the backbone does with embeddings, done with these."""
        transformer = kw_args["transformer"]
        states = self.make_prompt()[None]
        own = torch.arange(self.prompt_len, device=position_ids.device) * int(self.has_positions)
        own = own.expand(*position_ids.shape[:-1], -1)
        positions, outputs = self._positions(own, None, kw_args)
        if not transformer.config.causal:
            mask = kw_args["padding_mask"]
            everyone = torch.cat((own, position_ids), dim=-1)
            _, outputs = self._positions(everyone, None if mask is None else self._padded(mask, 1), kw_args)
        if self.has_positions and positions is not None:
            states = states + positions[:1]
        if transformer.embedding_norm is not None:
            states = transformer.embedding_norm(states)
        return Prompt(transformer.embedding_dropout(states), outputs)

    def _positions(
        self, position_ids: Tensor, padding_mask: Tensor | None, kw_args: dict[str, Any]
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """What all mixins together answer for these positions, and what they hand to the layers."""
        given = kw_args["output_cross_layer"]
        outputs = Outputs(given.kind, RESERVED, dict(given.content), dict(given.writers), given.writer)
        ids, length = kw_args["input_ids"], position_ids.shape[-1]
        if ids is not None:
            real_id = int(kw_args["transformer"].config.padding_id == 0)
            ids = self._padded(ids, real_id)[:, :length]
        own = {
            "input_ids": ids,
            "padding_mask": padding_mask,
            "token_type_ids": None,
            "mems": None,
            "given_position_ids": None if length == self.prompt_len else kw_args["given_position_ids"],
            "positions_before": 0,
            "output_cross_layer": outputs,
            "cross_layer_output": outputs,
            "prompt_pass": None,
        }
        positions = kw_args["hooks"].position_embedding_forward(position_ids, **{**kw_args, **own})
        return positions, outputs.content

    def _keys(self, batch: int, kw_args: dict[str, Any]) -> PromptKeys:
        """The keys and values of the prompt in this layer of a causal model."""
        mems, names = kw_args["mems"], [(kw_args["layer_id"], f"prompt.{each}") for each in ("key", "value")]
        if _is_remembered(mems, kw_args["layer_id"]):
            return PromptKeys(*(mems.constants[name] for name in names))
        keys, prompt = PromptKeys(), kw_args["prompt"]
        outputs = Outputs.empty("output_cross_layer", reserved=RESERVED)
        own = {
            **prompt.outputs,
            **kw_args.get("prompt_outputs", {}),
            "padding_mask": None,
            "log_attention_weights": None,
            "mems": None,
            "position_ids": torch.full((1, self.prompt_len), NOWHERE, device=prompt.states.device),
            "output_this_layer": Outputs.empty("output_this_layer"),
            "output_cross_layer": outputs,
            "prompt_pass": keys,
        }
        states = kw_args.get("prompt_states", prompt.states.expand(batch, -1, -1))
        states = kw_args["hooks"].layer_forward(states, Causal(), **{**kw_args, **own})
        kw_args["output_cross_layer"]["prompt_states"] = states
        kw_args["output_cross_layer"]["prompt_outputs"] = outputs.content
        if mems is not None:
            mems.constants.update({names[0]: keys.key, names[1]: keys.value})
        return keys

    def _together(self, hidden_states: Tensor, mask: Mask, old_impl: Hook, kw_args: dict[str, Any]) -> Tensor:
        """Run a layer of a bidirectional model for prompt and tokens, `[b, s, h]` to `[b, s, h]`."""
        prompt, padding, ids = kw_args["prompt"], kw_args["padding_mask"], kw_args["position_ids"]
        call = {
            **kw_args,
            **prompt.outputs,
            "padding_mask": None if padding is None else self._padded(padding, 1),
            "position_ids": self._padded(ids, NOWHERE),
        }
        if _tells_documents_apart(mask):
            raise HookCallError(
                "a prompt before packed documents would carry what it reads in one to the others, in a model that sees "
                "in both directions: give each document a row of its own."
            )
        states = kw_args.get("prompt_states", prompt.states.expand(len(hidden_states), -1, -1))
        mask = mask if isinstance(mask, Full) else Prompted(mask, self.prompt_len)
        both: Tensor = old_impl(torch.cat((states.to(hidden_states.dtype), hidden_states), dim=1), mask, **call)
        kw_args["output_cross_layer"]["prompt_states"] = both[:, : self.prompt_len]
        return both[:, self.prompt_len :]

    def _padded(self, x: Tensor, value: int) -> Tensor:
        """`[..., s]` to `[..., prompt_len + s]`."""
        return F.pad(x, (self.prompt_len, 0), value=value)


@final
class PromptTuningMixin(PromptMixin):
    """A prompt whose embeddings are the parameters."""

    def __init__(
        self,
        hidden_size: int,
        *,
        prompt_len: int = 16,
        has_positions: bool = True,
        reaches_decoder: bool = False,
    ) -> None:
        """Start with small random values; `start_from` takes those of tokens.

        Raises:
            ConfigError: A length that is none.
        """
        super().__init__(prompt_len, has_positions=has_positions, reaches_decoder=reaches_decoder)
        self.embedding = nn.Embedding(prompt_len, hidden_size)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def make_prompt(self) -> Tensor:
        """The embeddings, `[prompt_len, h]`."""
        prompt: Tensor = self.embedding.weight
        return prompt

    def start_from(self, word_embeddings: nn.Embedding, token_ids: Sequence[int]) -> Self:
        """Start from the embeddings of tokens, which trains better than random ones; repeated to the prompt's length.

        Raises:
            ConfigError: There are no tokens, or one is none of the model's.
        """
        vocab_size = word_embeddings.num_embeddings
        if not token_ids or not all(0 <= token < vocab_size for token in token_ids):
            raise ConfigError(f"token_ids={list(token_ids)} must be tokens of a vocabulary of {vocab_size}.")
        ids = torch.tensor([token_ids[index % len(token_ids)] for index in range(self.prompt_len)])
        with torch.no_grad():
            self.embedding.weight.copy_(word_embeddings.weight[ids.to(word_embeddings.weight.device)])
        return self


def _tells_documents_apart(mask: Mask) -> bool:
    inner = [getattr(mask, each.name) for each in fields(mask)]
    return isinstance(mask, Documents) or any(_tells_documents_apart(each) for each in inner if isinstance(each, Mask))


def _is_remembered(mems: Any, layer_id: int = 0) -> bool:
    """Whether a cache has the prompt's keys and values in a layer."""
    return mems is not None and (layer_id, "prompt.key") in mems.constants
