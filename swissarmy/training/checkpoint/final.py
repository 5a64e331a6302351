"""The model that a run gives away: one folder that every command takes, whole, however the run was sharded."""

import logging
from pathlib import Path
from typing import Any, final

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from swissarmy.backbone.model import Model
from swissarmy.data.tokenizer import Tokenizer
from swissarmy.interop.mixin_folder import write_mixins
from swissarmy.interop.safe_write import write_folder
from swissarmy.interop.save import write_model
from swissarmy.training.ranks import Ranks

_LOG = logging.getLogger(__name__)


def save_final(model: Model, folder: Path, tokenizer: Tokenizer | None, ranks: Ranks) -> None:
    """Write a model in the Hugging Face layout, its mixins in `mixins/`, the tokenizer's files beside it.

    Every rank calls it. The first one writes, and asks the others for one tensor after the other: none holds more than
    its shards and one tensor. A folder of an earlier save is replaced when the new one is complete.

    Of a model whose weights were reduced (`quantize=...`) there are only the mixins to write.

    Args:
        model: Sharded or not.
        folder: Its name; it is there when it is complete.
        tokenizer: The model's, if it has one.
        ranks: The processes.

    Raises:
        CheckpointError: On every rank: it cannot be written, or holds files that no save wrote.
    """
    model = model.saved
    gathering = _Gathering(model, ranks)
    if ranks.is_first:
        gathering.end(_error_of(model, folder, tokenizer, gathering))
    else:
        gathering.serve()


def _error_of(model: Model, folder: Path, tokenizer: Tokenizer | None, gathering: "_Gathering") -> Exception | None:
    try:
        with write_folder(folder, overwrite=True) as target:
            if any(parameter.is_meta for parameter in model.parameters()):
                _LOG.warning(
                    "%s holds mixins alone, for the weights below them were reduced: sat.load_adapter, or --adapter, "
                    "puts them onto a model",
                    folder,
                )
                write_mixins(model, model.source, target, gathering.whole)
            else:
                write_model(model, target, gathering.whole)
            if tokenizer is not None:
                tokenizer.save_pretrained(target)
    except Exception as error:  # noqa: BLE001 - raised again on every rank
        return error
    return None


@final
class _Gathering:
    """One rank asks for whole tensors by name; the others lend their shards until it says that it is done."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._ranks = ranks

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """On the first rank: a tensor with all its shards."""
        if not isinstance(tensor, DTensor):
            return tensor
        self._tell(name, None)
        return tensor.full_tensor()

    def end(self, error: Exception | None) -> None:
        """On the first rank: let the others go, with the error if there was one."""
        self._tell(None, error)
        if error is not None:
            raise error

    def serve(self) -> None:
        """On the others: until the end."""
        while True:
            name, error = self._tell(None, None)
            if error is not None:
                raise error
            if name is None:
                return
            tensor = self._tensors[name].detach()
            assert isinstance(tensor, DTensor), "the first rank asks for nothing else"
            tensor.full_tensor()

    def _tell(self, name: str | None, error: Exception | None) -> tuple[str | None, Exception | None]:
        message: list[Any] = [name, error]
        if self._ranks.world_size > 1:
            dist.broadcast_object_list(message, src=0, group=self._ranks.group)
        return message[0], message[1]
