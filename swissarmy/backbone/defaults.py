"""What each hook does when no mixin says otherwise: the Transformer itself, from embedding to logits.

Shapes: b batch, s positions, h hidden size, d head size, t keys.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from swissarmy.backbone.layer import Attention
from swissarmy.core.errors import HookCallError
from swissarmy.core.hooks import HookTable
from swissarmy.nn.attention import attention
from swissarmy.nn.linear import linear
from swissarmy.nn.masks import Mask


def word_embedding_forward(input_ids: Tensor | None, **kw_args: Any) -> Tensor:
    """`[b, s]` token ids to `[b, s, h]`."""
    return look_up(kw_args["transformer"].word_embeddings, input_ids)


def look_up(table: nn.Module | None, input_ids: Tensor | None) -> Tensor:
    """The rows of a table that has `num_embeddings` of them, `[b, s]` to `[b, s, h]`.

    Raises:
        HookCallError: There is no table, or an id is outside it.
    """
    if table is None or input_ids is None:
        raise HookCallError("the model needs input_ids [b, s], and a vocabulary to look them up in.")
    try:
        if isinstance(table, nn.Embedding) and type(table.weight) is not nn.Parameter:
            from swissarmy.nn.shared_vocabulary import check_ids  # at call time: one process needs none of this

            check_ids(input_ids, table.num_embeddings)
        embedded: Tensor = table(input_ids)
    except IndexError:
        raise HookCallError(
            f"input_ids hold ids from {int(input_ids.min())} to {int(input_ids.max())}; "
            f"this model's vocabulary has {table.num_embeddings}, from 0 on."
        ) from None
    return embedded


def position_embedding_forward(position_ids: Tensor, **kw_args: Any) -> None:
    """Adds nothing: positions are a mixin's business (learned, rotary, relative, ...)."""


def layer_forward(hidden_states: Tensor, mask: Mask, **kw_args: Any) -> Tensor:
    """Attention, cross-attention when the backbone has it, MLP; `[b, s, h]` to `[b, s, h]`.

    What a sublayer gives gets no name here: it would stay in memory, and in the way of the next one's, for nothing.
    """
    layer, hooks = kw_args["layer"], kw_args["hooks"]

    residual = layer.attention_residual
    hidden_states = residual.add(
        hidden_states, hooks.attention_forward(residual.prepare(hidden_states), mask, **kw_args)
    )

    if layer.cross_attention is not None:
        residual = layer.cross_attention_residual
        rest = dict(kw_args)
        encoder_outputs, cross_mask = rest.pop("encoder_outputs", None), rest.pop("cross_attention_mask", None)
        hidden_states = residual.add(
            hidden_states,
            hooks.cross_attention_forward(residual.prepare(hidden_states), cross_mask, encoder_outputs, **rest),
        )

    residual = layer.mlp_residual
    result: Tensor = residual.add(hidden_states, hooks.mlp_forward(residual.prepare(hidden_states), **kw_args))
    return result


def attention_forward(hidden_states: Tensor, mask: Mask, **kw_args: Any) -> Tensor:
    """Self-attention over `[b, s, h]`."""
    return _attend("attention", kw_args["layer"].attention, hidden_states, hidden_states, mask, False, kw_args)


def cross_attention_forward(
    hidden_states: Tensor, cross_attention_mask: Mask, encoder_outputs: Tensor | None, **kw_args: Any
) -> Tensor:
    """Attention of `[b, s, h]` over an encoder's output `[b, t, h of the encoder]`."""
    if encoder_outputs is None:
        raise HookCallError("the backbone has cross-attention: call it with encoder_outputs=[b, t, h].")
    layer_attention = kw_args["layer"].cross_attention
    return _attend(
        "cross_attention", layer_attention, hidden_states, encoder_outputs, cross_attention_mask, True, kw_args
    )


def attention_fn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    dropout_fn: nn.Module,
    cross_attention: bool = False,
    *,
    attention_bias: Tensor | None = None,
    attention_softcap: float | None = None,
    **kw_args: Any,
) -> Tensor:
    """The kernel. Wrappers of the stage `bias` pass it `attention_bias` (added to the scores, `[b|1, heads|1, s, t]`)
    and `attention_softcap`.
    """
    block: Attention = kw_args["layer"].cross_attention if cross_attention else kw_args["layer"].attention
    return attention(q, k, v, mask, dropout_fn, scale=block.scale, bias=attention_bias, softcap=attention_softcap)


def mlp_forward(hidden_states: Tensor, **kw_args: Any) -> Tensor:
    """The MLP over `[b, s, h]`, each projection through `linear_forward`."""
    result: Tensor = kw_args["layer"].mlp(hidden_states, _projector("mlp", kw_args))
    return result


def routing_forward(hidden_states: Tensor, **kw_args: Any) -> None:
    """A plain backbone has no experts to choose from."""
    raise HookCallError("routing_forward was called, and no mixin brings experts: add sat.MixtureOfExpertsMixin.")


def linear_forward(x: Tensor, linear: nn.Module, name: str, **kw_args: Any) -> Tensor:
    """The projection itself."""
    projected: Tensor = linear(x)
    return projected


def final_forward(hidden_states: Tensor, **kw_args: Any) -> Tensor:
    """Logits `[b, s, vocab]`, from the word embedding or the backbone's own head."""
    transformer = kw_args["transformer"]
    if transformer.lm_head is not None:
        logits: Tensor = transformer.lm_head(hidden_states)
        return logits
    if transformer.word_embeddings is None:
        return hidden_states
    return linear(hidden_states, transformer.word_embeddings.weight)


DEFAULTS = HookTable(
    word_embedding_forward=word_embedding_forward,
    position_embedding_forward=position_embedding_forward,
    layer_forward=layer_forward,
    attention_forward=attention_forward,
    cross_attention_forward=cross_attention_forward,
    attention_fn=attention_fn,
    mlp_forward=mlp_forward,
    routing_forward=routing_forward,
    linear_forward=linear_forward,
    final_forward=final_forward,
)


def _attend(
    name: str,
    block: Attention,
    hidden_states: Tensor,
    source: Tensor,
    mask: Mask,
    cross_attention: bool,
    kw_args: dict[str, Any],
) -> Tensor:
    """Project `[b, s, h]` to heads, let `attention_fn` mix them, project back."""
    project = _projector(name, kw_args)
    q = _heads(project(hidden_states, block.query, "query"), block.num_heads)
    k = _heads(project(source, block.key, "key"), block.num_kv_heads)
    v = _heads(project(source, block.value, "value"), block.num_kv_heads)
    attention_fn = kw_args["hooks"].attention_fn
    context = attention_fn(q, k, v, mask, block.dropout, cross_attention=cross_attention, **kw_args)
    return project(context.transpose(1, 2).flatten(2), block.output, "output")


def _projector(block: str, kw_args: dict[str, Any]) -> Callable[[Tensor, nn.Linear, str], Tensor]:
    """What applies the projections of a block: the hook, or where no mixin answers it, the projection alone.

    Cached decoding calls six projections a layer for little arithmetic each; the keywords of a hook that nobody
    answers would be most of what they cost.
    """
    hook = kw_args["hooks"].linear_forward
    if hook is linear_forward:
        return _apply

    def project(x: Tensor, linear: nn.Linear, name: str) -> Tensor:
        projected: Tensor = hook(x, linear, f"{block}.{name}", **kw_args)
        return projected

    return project


def _apply(x: Tensor, linear: nn.Linear, name: str) -> Tensor:
    projected: Tensor = linear(x)
    return projected


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """`[b, s, heads * d]` to `[b, heads, s, d]`."""
    return x.reshape(*x.shape[:2], num_heads, x.shape[2] // num_heads).transpose(1, 2)
