"""GGUF model files (llama.cpp) as a source of Hugging Face tensors: the same names, shapes and config.json."""

from pathlib import Path
from typing import Any, final

import torch

from swissarmy.core.errors import nearest
from swissarmy.interop.gguf_architectures import GGUFFields, find_architecture
from swissarmy.interop.gguf_file import GGUFFile, GGUFTensor


@final
class GGUFSource:
    """The tensors of a GGUF file under their Hugging Face names, dequantised one at a time; a `TensorSource`.

    Args:
        path: the file, of architecture llama or gemma3 (text).
        dtype: what every tensor is read as.

    Attributes:
        config: what a Hugging Face `config.json` for this model says, in the field names of transformers 5.
        file: the header, for whoever needs the metadata (the tokenizer).

    Raises:
        CheckpointError: the file is truncated or corrupt, or its architecture, a field of its metadata or a
            tensor of its own is not known.
        MissingExtraError: the package `gguf` is not installed.
    """

    config: dict[str, Any]
    file: GGUFFile

    def __init__(self, path: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        self.file = GGUFFile(path)
        self._dtype = dtype
        self._architecture = find_architecture(self.file)
        fields = GGUFFields(self.file, str(self.file.metadata["general.architecture"]))
        self.config = self._architecture.config(fields) | {"dtype": str(dtype).removeprefix("torch.")}
        fields.refuse_unread()
        self._tensors = self._map_names()

    def names(self) -> tuple[str, ...]:
        """The Hugging Face names, in the order of the file."""
        return tuple(self._tensors)

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self._find(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        self._find(name)
        return self._dtype

    def read(self, name: str) -> torch.Tensor:
        """The tensor as Hugging Face has it, on the CPU; its memory is its own."""
        found = self._find(name)
        # norms are restored before they are rounded to `dtype`: 1 is taken off them
        dtype = torch.float32 if len(found.shape) == 1 else self._dtype
        tensor = self._architecture.restore(name, self.file.dequantise(found, dtype), self.config)
        return tensor.to(self._dtype)

    def where(self, name: str) -> str:
        """The name of the file, for messages."""
        self._find(name)
        return str(self.file.path)

    def _find(self, name: str) -> GGUFTensor:
        if name not in self._tensors:
            self.file.fail(f"it has no tensor {name!r}.{nearest(name, self._tensors)}")
        return self._tensors[name]

    def _map_names(self) -> dict[str, GGUFTensor]:
        named: dict[str, GGUFTensor] = {}
        layers = self.config["num_hidden_layers"]
        for name, tensor in self.file.tensors.items():
            if name in self._architecture.consumed:
                continue
            target = self._architecture.hugging_face_name(name, layers)
            if target is None:
                self.file.fail(f"tensor {name!r} is not one that a {self.config['model_type']} model has")
            named[target] = tensor
        return named
