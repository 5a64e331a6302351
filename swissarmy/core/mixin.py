"""`BaseMixin`: what a mixin is, apart from what it does."""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

from torch import nn

from swissarmy.core.errors import ConfigError, HookDefinitionError, nearest
from swissarmy.core.hooks import check_accepts, check_hook_methods


class MixinHost(Protocol):
    """What a mixin needs to know of a model to take its sizes from it."""

    config: Any
    """The sizes; a model of parts has none of its own."""
    parts: Any
    """The models that this model is made of, by name; empty for a plain one."""


class SharedDim(NamedTuple):
    """A dimension of a parameter that tensor-parallel processes may share, and what it counts."""

    dim: int
    of: Literal["heads", "width", "vocabulary"]
    """Heads (of queries, or of keys and values), the width inside the MLP, or tokens."""


class BaseMixin(nn.Module):
    """A change to a Transformer: some of the ten hooks, and the parameters they need.

    Define a method named like a hook. Parameters appear in the model's state dict as
    `mixins.<name>.<param>`; what belongs to one layer lives in `self.layers[i]`, a module that is called.
    """

    accepts: ClassVar[tuple[str, ...]] = ()
    """Keywords of the model's call that this mixin reads from `kw_args` without naming them in a signature."""

    shared_dims: ClassVar[Mapping[str, SharedDim]] = {}
    """Parameters by pattern (`"layers.*.key"`), and the dimension that tensor-parallel processes share; any other
    parameter is whole on each of them. It saves memory, and changes no result."""

    keeps_outputs: ClassVar[bool] = False
    """Whether the model computes the same with and without it, as with a cache; such a mixin need not be saved."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse misspelt hooks and signatures that cannot be called, when the class is created."""
        super().__init_subclass__(**options)
        check_hook_methods(cls)
        check_accepts(cls, cls.accepts)

    @property
    def first_position(self) -> int:
        """The position of a row's first token, as this mixin wants `position_ids` to count."""
        return 0

    @property
    def positions_before(self) -> int:
        """How many positions this mixin takes before a row's first token, as a prompt does.

        Callers need not know: so much is added to `position_ids` before they reach `position_embedding_forward`.
        """
        return 0

    @property
    def saved_options(self) -> Mapping[str, Any] | None:
        """What `for_model` makes the same mixin from, in values that JSON can hold, or `None`.

        With it, `sat.load` makes a mixin of the library again by itself; without it, the caller gives the mixin.
        """
        return None

    def extra_repr(self) -> str:
        """The options, for printing."""
        return ", ".join(f"{name}={value!r}" for name, value in (self.saved_options or {}).items())

    @classmethod
    def for_model(cls, model: MixinHost, **options: Any) -> Any:
        """The mixin with its sizes filled in from a model; for a model of parts, one for each that it suits.

        Returns:
            A mixin, or for a model of several parts a dict from part name to mixin; `add_mixin` takes both.

        Raises:
            ConfigError: There is no such option, or its value cannot be.
        """
        suited = {name: part for name, part in model.parts.items() if cls.suits(part.config)}
        try:
            if model.parts:
                return {name: cls.for_config(part.config, **options) for name, part in suited.items()}
            return cls.for_config(model.config, **options)
        except TypeError as error:
            _check_options(cls, options, error)
            raise

    @classmethod
    def for_config(cls, config: Any, **options: Any) -> Self:
        """The mixin for a backbone of these sizes. A mixin without sizes needs none of them."""
        del config
        return cls(**options)

    @classmethod
    def suits(cls, config: Any) -> bool:
        """Whether this mixin means something on a backbone of this configuration."""
        del config
        return True


def check_is_mixin(name: str, mixin: object) -> None:
    """Refuse what is no mixin, and a class in place of one.

    Raises:
        HookDefinitionError: With what to write instead.
    """
    if isinstance(mixin, type) and issubclass(mixin, BaseMixin):
        raise HookDefinitionError(
            f"mixin '{name}' is the class {mixin.__name__}; add an instance: {mixin.__name__}.for_model(model, ...)."
        )
    if not isinstance(mixin, BaseMixin):
        raise HookDefinitionError(f"mixin '{name}' is a {type(mixin).__name__}; it must be a sat.BaseMixin.")


def _check_options(cls: type[BaseMixin], options: Mapping[str, Any], error: TypeError) -> None:
    """Name the option that the signatures of a class refused, where that is the error."""
    for name in options:
        if f"unexpected keyword argument '{name}'" in str(error):
            parameters = [
                each for made in (cls.for_config, cls) for each in inspect.signature(made).parameters.values()
            ]
            known = {each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
            known -= {"config"}
            raise ConfigError(
                f"{cls.__name__}: unknown option '{name}'.{nearest(name, known)} "
                f"It is made from: {', '.join(sorted(known)) or 'nothing'}; a model gives the sizes."
            ) from error
