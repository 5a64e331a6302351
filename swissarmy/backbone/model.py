"""`BaseModel`: a backbone, and the mixins added to it."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, Self

import torch
from torch import Tensor, nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.defaults import DEFAULTS
from swissarmy.backbone.explain import explain_hooks
from swissarmy.backbone.inputs import check_inputs
from swissarmy.backbone.parameters import TrainableSummary, freeze, freeze_except, trainable_summary
from swissarmy.backbone.transformer import Transformer
from swissarmy.core.compose import accepted_keywords, resolve
from swissarmy.core.errors import HookCallError, HookConflictError, HookDefinitionError, nearest
from swissarmy.core.hooks import HookTable, check_hook_methods
from swissarmy.core.mixin import BaseMixin, check_is_mixin
from swissarmy.nn.kv_cache import KVCache
from swissarmy.nn.masks import Causal, Full, Mask, Padding, as_mask
from swissarmy.nn.token_losses import token_losses


class Natural(Enum):
    """The value of an attention mask that was not given: the family's own."""

    MASK = "natural"


NATURAL: Final = Natural.MASK


OWN_KEYWORDS = ("input_ids", "position_ids", "attention_mask", "padding_mask", "mems", "logits_to_keep", "targets")
"""What every call accepts, beside the keywords of the hooks."""


class Model(nn.Module, ABC):
    """What a plain model and a model of parts have in common."""

    source: Any = None
    """Where the weights came from: the family and its configuration, for writing them back."""

    parts: nn.ModuleDict
    """The models that this one is made of; empty for a plain one."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._some_parameter().device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the parameters."""
        return self._some_parameter().dtype

    @property
    def saved(self) -> "Model":
        """The model that is written when this one is saved: itself, unless it only helps another one to train."""
        return self

    @abstractmethod
    def add_mixin(self, name: str, mixin: Any, part: str | None = None) -> Self:
        """Add a mixin; in a model of parts to one part, or to every part that it suits."""

    @abstractmethod
    def explain(self) -> str:
        """Every hook, and the chain of mixins that answers it, from the outside in."""

    @abstractmethod
    def enable_activation_checkpointing(self, every: int = 1, *, selective: bool = False) -> Self:
        """Recompute layers in the backward pass instead of keeping their activations.

        Args:
            every: Every n-th layer; 0 turns it off.
            selective: Keep the results of products and of attention, and recompute only what is cheap.
        """

    @abstractmethod
    def compile(self, *, dynamic: bool | None = True, **options: Any) -> None:
        """Compile each layer, with the mixins that take part in it, when it is first called.

        Layers are compiled one by one: that takes a fraction of the time of a whole model, an added mixin costs no
        more than its own graph, and views of the model (as generation makes them) share what was compiled. In cached
        decoding each layer has one graph for prompts of any length and one for steps of any length.

        Args:
            dynamic: Whether one graph serves all lengths; `False` makes one for each shape, for training in which
                shapes do not change.
            **options: For `torch.compile` (`mode`, `backend`, ...). The library's mixins work with `fullgraph=True`;
                without it, what cannot be compiled, such as a mixin that raises, runs as it is written.
        """

    @abstractmethod
    def for_decoding(self, **kw_args: Any) -> tuple["BaseModel", dict[str, Any]]:
        """The model that decodes, and what it is called with in each step."""

    def _some_parameter(self) -> nn.Parameter:
        """The first that has a place; reduced weights leave those that they stand in for on the meta device."""
        return next((each for each in self.parameters() if not each.is_meta), next(self.parameters()))

    def freeze_except(self, *patterns: str) -> Self:
        """Train only the parameters whose names match (`"mixins.lora"`, `"layers.{8..11}"`); freeze all others."""
        freeze_except(self, patterns)
        return self

    def freeze(self, *patterns: str) -> Self:
        """Freeze the parameters whose names match (`"word_embeddings"`, `"layers.{0..7}"`), and no others."""
        freeze(self, patterns)
        return self

    def trainable_summary(self) -> TrainableSummary:
        """How many parameters train, and which; prints as a table."""
        return trainable_summary(self)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model in Hugging Face's layout; `sat.load` and, for its families, `transformers` read it.

        Raises:
            CheckpointError: The folder exists and is not empty, or cannot be written.
        """
        from swissarmy.interop.save import save_pretrained  # upward, so at call time: loading needs no saving

        save_pretrained(self.saved, Path(folder))

    def save_adapter(
        self,
        folder: str | Path,
        name: str | None = None,
        *,
        layout: Literal["peft", "mixins"] | None = None,
        modules_to_save: Sequence[str] = (),
    ) -> None:
        """Write a mixin of this model without the model; `sat.load_adapter` reads it.

        LoRA, IA3, VeRA, BitFit (PEFT's BEFT), prefix-tuning, prompt tuning and P-tuning are written as `peft` does, and
        it reads them; any other mixin, and what PEFT would compute otherwise, in a folder `mixins/`.

        Args:
            folder: A new folder.
            name: The mixin; may be left out where there is only one.
            layout: One of the two for a mixin that could have both.
            modules_to_save: What trained beside it and goes along, by the beginnings of parameters' names
                (`"mixins.head"`); for `peft` only.

        Raises:
            CheckpointError: There is no such mixin, PEFT cannot represent it, or the folder cannot be written.
        """
        from swissarmy.interop.adapter import save_adapter  # upward, as in save_pretrained

        save_adapter(self, Path(folder), name=name, layout=layout, modules_to_save=modules_to_save)


class BaseModel(Model):
    """A Transformer: `model(input_ids)` gives `(logits, outputs of layer 0, outputs of layer 1, ...)`.

    The plain backbone is causal, normalised before each sublayer, and knows no positions: these, as all else,
    are mixins. A hook method defined on a subclass counts as its first mixin.
    """

    def __init__(self, config: TransformerConfig, mixins: Mapping[str, BaseMixin] | None = None) -> None:
        """Make the backbone with new weights, and add `mixins` in their order."""
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.mixins = nn.ModuleDict()
        self.parts = nn.ModuleDict()
        self.checkpoint_every, self.checkpoint_selective = 0, False
        self._resolve()
        for name, mixin in (mixins or {}).items():
            self.add_mixin(name, mixin)

    def __init_subclass__(cls, **options: Any) -> None:
        """Check hook methods that are defined on a model class, as those of a mixin are."""
        super().__init_subclass__(**options)
        check_hook_methods(cls)

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Mask | Tensor | int | Literal[Natural.MASK] | None = NATURAL,
        *,
        padding_mask: Tensor | None = None,
        mems: KVCache | None = None,
        logits_to_keep: int | None = None,
        targets: Tensor | None = None,
        **kw_args: Any,
    ) -> tuple[Any, ...]:
        """Run the model.

        Args:
            input_ids: Token ids `[b, s]`.
            position_ids: The position of each token, `[b or 1, s]`; counted from the end of `mems` when omitted.
            attention_mask: Omitted for the model's natural mask; `None` (full), -1 (causal), a mask, or a tensor
                `[q, k]` or `[b|1, heads|1, q, k]` with 1 = visible.
            padding_mask: `[b, k]`, 1 = a real token; combined with the attention mask.
            mems: A key-value cache that a `CachedAutoRegressiveMixin` reads and extends.
            logits_to_keep: Run the head on so many last positions only; on all when omitted.
            targets: The token that each position should predict, `[b, s]`, -100 for none: the model then gives
                `TokenLosses` in place of logits, which are never there all at once.
            **kw_args: Whatever the hooks of the model accept.

        Returns:
            What `final_forward` gives (logits `[b, s, vocab]`), or `TokenLosses` of the `targets`; then for each layer
            the dict that its hooks wrote.
        """
        self._check_keywords(kw_args)
        check_inputs(input_ids, mems, logits_to_keep, self.config)
        call = {**kw_args, "input_ids": input_ids, "padding_mask": padding_mask, "mems": mems}
        call["positions_before"] = self.positions_before
        if self.config.cross_attention:
            call["cross_attention_mask"] = as_mask(call.get("cross_attention_mask"))
        remembered = 0 if mems is None else len(mems)
        result = self.transformer(
            position_ids,
            self._mask(attention_mask, padding_mask),
            self.hooks,
            call,
            checkpoint_every=self.checkpoint_every,
            checkpoint_selective=self.checkpoint_selective,
        )
        if mems is not None and len(mems) == remembered:
            raise HookCallError("mems was given and no mixin wrote to it: add sat.CachedAutoRegressiveMixin().")
        kept = result.hidden_states if logits_to_keep is None else result.hidden_states[:, -logits_to_keep:]
        head = partial(self.hooks.final_forward, **result.kw_args)
        if targets is None:
            return head(kept), *result.outputs_per_layers
        vocabulary = max(self.config.vocab_size, 1)
        losses = token_losses(kept, targets, head, vocabulary=vocabulary, weight=self._head_weight())
        return losses, *result.outputs_per_layers

    def _head_weight(self) -> Tensor | None:
        """The weight of a head that is a product and nothing else; `None` where mixins have a part in it."""
        head = self.transformer.lm_head or self.transformer.word_embeddings
        return head.weight if head is not None and self.hooks.final_forward is DEFAULTS.final_forward else None

    def add_mixin(self, name: str, mixin: BaseMixin, part: str | None = None) -> Self:
        """Add a mixin; its parameters become `mixins.<name>.*` and move to the model's device and precision.

        Raises:
            HookDefinitionError: The name is none, or the mixin is none or made for another model.
            HookConflictError: The name is taken, or the mixin replaces a hook that another one replaces.
        """
        if part is not None:
            raise HookDefinitionError(f"part='{part}': this model has no parts; leave `part` out.")
        hooks = self.hooks_with(name, mixin)
        if self.device.type != "meta":
            mixin.to(device=self.device, dtype=self.dtype)
        mixin.train(self.training)
        self.mixins[name] = mixin
        self._resolve(hooks)
        return self

    def hooks_with(self, name: str, mixin: BaseMixin) -> HookTable:
        """The hooks that there would be with one more mixin, which is not added; errors are those of `add_mixin`."""
        self._check_new(name, mixin)
        return resolve({**self._answerers(), name: mixin}, DEFAULTS)

    def get_mixin(self, name: str) -> BaseMixin:
        """The mixin of that name."""
        if name not in self.mixins:
            raise HookDefinitionError(f"there is no mixin '{name}'.{nearest(name, self.mixins)} {self._names()}")
        mixin = self.mixins[name]
        assert isinstance(mixin, BaseMixin)
        return mixin

    def del_mixin(self, name: str) -> BaseMixin:
        """Remove a mixin, and return it; the model is exactly what it was before it was added."""
        mixin = self.get_mixin(name)
        del self.mixins[name]
        self._resolve()
        return mixin

    def with_mixin(self, name: str, mixin: BaseMixin) -> Self:
        """A second model on the same backbone and mixins, with one more; this model stays as it is."""
        view = object.__new__(type(self))  # as copy.copy does, which a sharded model's class does not let through
        view.__setstate__(self.__getstate__())
        view._modules = {**self._modules, "mixins": nn.ModuleDict(dict(self.mixins.items()))}
        return view.add_mixin(name, mixin)

    def explain(self) -> str:
        """Every hook, and the chain of mixins that answers it, from the outside in."""
        return explain_hooks(self._answerers(), title=f"{type(self).__name__}: {self.config.num_layers} layers")

    def enable_activation_checkpointing(self, every: int = 1, *, selective: bool = False) -> Self:
        """Recompute every n-th layer in the backward pass instead of keeping its activations; 0 turns it off."""
        if every < 0:
            raise HookCallError(f"every={every} must be 0 (off) or the distance between recomputed layers.")
        self.checkpoint_every, self.checkpoint_selective = every, selective
        return self

    def compile(self, *, dynamic: bool | None = True, **options: Any) -> None:
        """Compile each layer, with the mixins that take part in it, when it is first called."""
        for layer in self.transformer.layers:
            layer.compile(**{"isolate_recompiles": True, "dynamic": dynamic, **options})

    def for_decoding(self, **kw_args: Any) -> tuple["BaseModel", dict[str, Any]]:
        """The model that decodes, and what it is called with in each step: itself, and what was given.

        Raises:
            HookCallError: The model is not causal, so it cannot continue a text.
        """
        if not self.config.causal:
            name = type(self).__name__ if self.source is None else self.source.config.architecture
            raise HookCallError(
                f"{name} is not causal and continues no text: load a causal model, or fill masks with model(input_ids)."
            )
        return self, kw_args

    @property
    def first_position(self) -> int:
        """The position of a row's first token, as the mixins of this model want `position_ids` to count."""
        return max((self.get_mixin(name).first_position for name in self.mixins), default=0)

    def find_mixin(self, kind: type[BaseMixin]) -> str | None:
        """The name of the first mixin of this class, or `None`."""
        return next((name for name, mixin in self.mixins.items() if isinstance(mixin, kind)), None)

    def _mask(self, attention_mask: Any, padding_mask: Tensor | None) -> Mask:
        natural: Mask = Causal() if self.config.causal else Full()
        mask = natural if attention_mask is NATURAL else as_mask(attention_mask)
        return mask if padding_mask is None else mask & Padding(padding_mask)

    def _check_keywords(self, kw_args: Mapping[str, Any]) -> None:
        unknown = [key for key in kw_args if key not in self.accepted]
        if unknown:
            accepted = sorted({*self.accepted, *OWN_KEYWORDS})
            raise HookCallError(
                f"no hook of this model accepts the keyword '{unknown[0]}'."
                f"{nearest(unknown[0], accepted)} Accepted: {', '.join(accepted)}. "
                "A mixin accepts a keyword by naming it in a hook's signature or in `accepts`."
            )

    def _check_new(self, name: str, mixin: BaseMixin) -> None:
        check_is_mixin(name, mixin)
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise HookDefinitionError(f"mixin name {name!r}: use letters, digits, '_' and '-' only.")
        if name in self.mixins:
            raise HookConflictError(
                f"there is a mixin '{name}' already: choose another name, or del_mixin('{name}') first."
            )
        if name == type(self).__name__ or name in dir(self.mixins):
            raise HookDefinitionError(f"mixin name '{name}' has a meaning of its own: choose another name.")
        twin = next((other for other, own in self.mixins.items() if own is mixin), None)
        if twin is not None:
            raise HookConflictError(f"'{name}' is the very mixin that is here as '{twin}': make another one.")
        layers = mixin._modules.get("layers")
        if isinstance(layers, nn.ModuleList) and len(layers) != self.config.num_layers:
            raise HookDefinitionError(
                f"mixin '{name}' has {len(layers)} layers and the model {self.config.num_layers}: "
                f"{type(mixin).__name__}.for_model(model, ...) fills in the sizes."
            )

    def _names(self) -> str:
        return f"The model has: {', '.join(self.mixins) or 'no mixins'}."

    def _answerers(self) -> dict[str, object]:
        return {type(self).__name__: self, **self.mixins}

    def _resolve(self, hooks: HookTable | None = None) -> None:
        """Rebuild the immutable table that forward passes read."""
        self.hooks = hooks or resolve(self._answerers(), DEFAULTS)
        self.accepted = accepted_keywords(self._answerers(), DEFAULTS)
        self.positions_before = sum(self.get_mixin(name).positions_before for name in self.mixins)
        if self.config.cross_attention:
            self.accepted |= {"encoder_outputs", "cross_attention_mask"}

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the resolved hooks, which hold methods of this very model."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {key: value for key, value in state.items() if key != "hooks"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and resolve the hooks of the copy."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._resolve()


def iterate_models(model: Model) -> Iterator[tuple[str, BaseModel]]:
    """The plain models inside a model, with the prefix of their parameter names."""
    if isinstance(model, BaseModel):
        yield "", model
    for name, part in model.parts.items():
        assert isinstance(part, BaseModel)
        yield f"parts.{name}.", part


def every_mixin(model: Model) -> Iterable[tuple[str, BaseMixin]]:
    """Each mixin with its full name, `mixins.x` or `parts.decoder.mixins.x`."""
    for prefix, plain in iterate_models(model):
        for name in plain.mixins:
            yield f"{prefix}mixins.{name}", plain.get_mixin(name)
