"""Evaluation mode for the length of a call: a model that is being trained generates without dropout."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

from torch import nn

# Which modules of a model train is not stored elsewhere while they do not: several generations, in several threads, may
# hold the same module out of training mode, and the last one gives it back.
_lock = Lock()
_held: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Run the body with the whole model in evaluation mode if it is in training mode; then each module is as it was.

    A model in evaluation mode is left alone: a dropout that its user switched on inside it stays on. Another thread may
    generate with the same model at the same time; one that trains it at the same time trains without dropout.
    """
    if not (model.training or model in _held):
        yield
        return
    with _lock:
        taken = [module for module in model.modules() if module.training or module in _held]
        for module in taken:
            _held[module] = _held.get(module, 0) + 1
            module.training = False
    try:
        yield
    finally:
        with _lock:
            for module in taken:
                _held[module] -= 1
                if _held[module] == 0:
                    del _held[module]
                    module.training = True
