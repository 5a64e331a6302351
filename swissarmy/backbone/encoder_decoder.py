"""`EncoderDecoderModel`: two Transformers, the second of which attends to what the first has read.

Shapes: b batch, t source positions, s target positions.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from swissarmy.backbone.composite import CompositeModel
from swissarmy.backbone.model import NATURAL, BaseModel
from swissarmy.core.errors import HookCallError, HookDefinitionError
from swissarmy.nn.kv_cache import KVCache
from swissarmy.nn.masks import Full, Mask, Padding


class EncoderDecoderModel(CompositeModel):
    """`model(input_ids, decoder_input_ids=...)` gives the decoder's `(logits, outputs of layer 0, ...)`."""

    def __init__(
        self,
        encoder: BaseModel,
        decoder: BaseModel,
        *,
        share_word_embeddings: bool = True,
        start_token_id: int | None = None,
    ) -> None:
        """Join two models.

        Args:
            encoder: Reads the source.
            decoder: Its configuration says `cross_attention=True`.
            share_word_embeddings: Whether the decoder uses the encoder's word embeddings.
            start_token_id: For a model whose target is its source (classifiers): where a call has no
                `decoder_input_ids`, they are the source shifted right behind this token.
        """
        super().__init__({"encoder": encoder, "decoder": decoder})
        self.start_token_id = start_token_id
        if not decoder.config.cross_attention:
            raise HookDefinitionError("the decoder has no cross-attention: give its config cross_attention=True.")
        if share_word_embeddings:
            decoder.transformer.word_embeddings = encoder.transformer.word_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        *,
        encoder_outputs: Tensor | None = None,
        padding_mask: Tensor | None = None,
        attention_mask: Any = NATURAL,
        position_ids: Tensor | None = None,
        decoder_padding_mask: Tensor | None = None,
        decoder_attention_mask: Any = NATURAL,
        decoder_position_ids: Tensor | None = None,
        mems: KVCache | None = None,
        logits_to_keep: int | None = None,
        targets: Tensor | None = None,
        **kw_args: Any,
    ) -> tuple[Any, ...]:
        """Read the source, then run the decoder.

        Args:
            input_ids: The source's token ids `[b, t]`; not needed with `encoder_outputs`.
            decoder_input_ids: The target's token ids `[b, s]`.
            encoder_outputs: `[b, t, h]`, to save reading the source again.
            padding_mask: The source's real tokens, `[b, t]`, 1 = real.
            attention_mask: The encoder's mask, as for `BaseModel`.
            position_ids: The source's positions.
            decoder_padding_mask: The target's real tokens, `[b, s]`.
            decoder_attention_mask: The decoder's mask.
            decoder_position_ids: The target's positions.
            mems: A key-value cache for the decoder.
            logits_to_keep: For the decoder, as for `BaseModel`.
            targets: What each position of the target should predict, `[b, s]`, as for `BaseModel`.
            **kw_args: Given to each part that accepts them.
        """
        if decoder_input_ids is None and input_ids is not None and self.start_token_id is not None:
            decoder_input_ids = F.pad(input_ids[:, :-1], (1, 0), value=self.start_token_id)
        if decoder_input_ids is None:
            raise HookCallError("an encoder-decoder needs decoder_input_ids [b, s], the target shifted right.")
        routed = self._route(kw_args)
        if encoder_outputs is None:
            encoder_outputs = self.encode(
                input_ids, position_ids, attention_mask, padding_mask=padding_mask, **routed["encoder"]
            )
        result: tuple[Any, ...] = self.parts["decoder"](
            decoder_input_ids,
            decoder_position_ids,
            decoder_attention_mask,
            padding_mask=decoder_padding_mask,
            mems=mems,
            logits_to_keep=logits_to_keep,
            targets=targets,
            **{**self._source(input_ids, encoder_outputs, padding_mask), **routed["decoder"]},
        )
        return result

    def encode(self, input_ids: Tensor | None, *arguments: Any, **kw_args: Any) -> Tensor:
        """What the encoder makes of the source, `[b, t, h]`; arguments as for `BaseModel`."""
        hidden_states: Tensor = self.parts["encoder"](input_ids, *arguments, **kw_args)[0]
        return hidden_states

    def for_decoding(
        self, *, input_ids: Tensor | None = None, padding_mask: Tensor | None = None, **kw_args: Any
    ) -> tuple[BaseModel, dict[str, Any]]:
        """The decoder, and what it is called with in each step: the source is read here, once."""
        if input_ids is None:
            raise HookCallError("an encoder-decoder generates from a source: give input_ids=[b, t].")
        routed = self._route(kw_args)
        encoder_outputs = self.encode(input_ids, padding_mask=padding_mask, **routed["encoder"])
        source = self._source(input_ids, encoder_outputs, padding_mask)
        return self.part("decoder"), {**source, **routed["decoder"]}

    def _source(self, input_ids: Tensor | None, encoder_outputs: Tensor, padding_mask: Tensor | None) -> dict[str, Any]:
        """What the decoder is told of the source; its token ids only if some hook of the decoder reads them."""
        mask: Mask = Full()
        if padding_mask is not None:
            prompt_len = encoder_outputs.shape[1] - padding_mask.shape[1]
            mask = Padding(F.pad(padding_mask, (prompt_len, 0), value=1) if prompt_len > 0 else padding_mask)
        source = {"encoder_outputs": encoder_outputs, "cross_attention_mask": mask}
        return source | {"source_ids": input_ids} if "source_ids" in self.part("decoder").accepted else source
