"""The shares of several model-parallel ranks as whole tensors, read a slice at a time.

A tensor is split on its rows, on its columns, or not at all. Fused rows are split block by block: rank r of
`query_key_value` holds its own rows of Q, then of K, then of V, so the whole is not the shares one after the other.
"""

import fnmatch
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from swissarmy.core.errors import CheckpointError, nearest
from swissarmy.interop.sat_legacy.torch_file import LegacyTensor, TorchFile
from swissarmy.interop.tensor_source import allocate


@final
@dataclass(frozen=True)
class Split:
    """How tensors of some names are split over ranks."""

    names: re.Pattern[str]
    dim: int | None
    """0 for rows, 1 for columns, `None` for not at all."""
    blocks: int = 1
    """How many equal blocks of rows are fused, where the caller does not know their sizes."""
    or_whole: bool = False
    """Whether some releases did not split it; then equal shares are the whole."""


def _split(pattern: str, dim: int, *, blocks: int = 1, or_whole: bool = False) -> Split:
    return Split(re.compile(rf"(?:.*\.)?(?:{pattern})"), dim, blocks, or_whole)


def user_split(pattern: str, way: str) -> Split:
    """How the caller says that tensors of some names are split; `*` stands for anything.

    Raises:
        CheckpointError: It is neither `rows` nor `columns`.
    """
    if way not in ("rows", "columns"):
        raise CheckpointError(f"'{pattern}={way}': tensors are split on 'rows' or 'columns'")
    return Split(re.compile(fnmatch.translate(pattern)), 0 if way == "rows" else 1)


_CHUNK_BYTES = 16 << 20
_LINEAR = r"(original\.)?(weight|bias)"
_SPLITS = (
    _split(r"transformer\.word_embeddings\.weight", 0, or_whole=True),
    _split(rf"layers\.\d+\.attention\.query_key_value\.{_LINEAR}", 0, blocks=3),
    _split(rf"layers\.\d+\.cross_attention\.query\.{_LINEAR}", 0),
    _split(rf"layers\.\d+\.cross_attention\.key_value\.{_LINEAR}", 0, blocks=2),
    _split(rf"layers\.\d+\.mlp\.dense_h_to_4h(_gate)?(_\d+)?\.{_LINEAR}", 0),
    _split(r"layers\.\d+\.(cross_)?attention\.dense\.(original\.)?weight", 1),
    _split(r"layers\.\d+\.mlp\.dense_4h_to_h(_\d+)?\.(original\.)?weight", 1),
    _split(rf"mixins\.attention_plus\.query_key_value\.\d+\.{_LINEAR}", 0, blocks=3),
    _split(r"mixins\.attention_plus\.dense\.\d+\.weight", 1),
    _split(r"mixins\.mlp\.gate_proj\.\d+\.(weight|bias)", 0),
    _split(r"mixins\.gated-mlp\.gated_h_to_4h_list\.\d+\.(weight|bias)", 0),
    _split(r"mixins\.mlp\.w2\.\d+\.(weight|bias)", 0, or_whole=True),
    _split(r"mixins\.(lm|t5-final)\.lm_head\.weight", 0, or_whole=True),
    _split(r"mixins\.t5-attention\.relative_attention_bias\.weight", 1, or_whole=True),
    _split(r"mixins\.prefix-tuning\.prefix\.\d+", 1, or_whole=True),
)
_WHOLE = Split(re.compile(""), None)


@final
@dataclass(frozen=True)
class _Piece:
    """A stretch along the split dimension: where it begins in the whole, and in which rank's share."""

    rank: int
    start: int
    local: int
    length: int


@final
class MergedSource:
    """The tensors of a checkpoint under their canonical names, merged; a `TensorSource`.

    Args:
        files: One for each rank.
        names: For each file, the stored name by the canonical one.
        splits: How tensors that are not SAT's own are split, before what is known of SAT's.
        blocks: Rows of each fused block, where these are not equal; by canonical name.

    Raises:
        CheckpointError: The ranks do not hold the same tensors, or uneven shares of them.
    """

    def __init__(
        self,
        files: Sequence[TorchFile],
        names: Sequence[Mapping[str, str]],
        splits: Sequence[Split] = (),
        blocks: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.files, self._stored, self._own_splits = tuple(files), tuple(names), tuple(splits)
        self._blocks = dict(blocks or {})
        self._splits: dict[str, Split] = {}
        self._check_ranks()

    def with_blocks(self, blocks: Mapping[str, Sequence[int]]) -> "MergedSource":
        """The same, knowing how many rows each fused block has."""
        return MergedSource(self.files, self._stored, self._own_splits, blocks)

    def names(self) -> tuple[str, ...]:
        """The canonical names, in the order of rank 0's file."""
        return tuple(self._stored[0])

    def shape(self, name: str) -> torch.Size:
        """The shape of the whole."""
        share, split = self._share(0, name).shape, self._how(name)
        if split.dim is None:
            return share
        sizes = list(share)
        sizes[split.dim] *= len(self.files)
        return torch.Size(sizes)

    def dtype(self, name: str) -> torch.dtype:
        """The precision."""
        return self._share(0, name).dtype

    def where(self, name: str) -> str:
        """The file of rank 0."""
        self._share(0, name)
        return self.files[0].path.name

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor."""
        shape = self.shape(name)
        if shape:
            return self.read_slice(name, 0, 0, shape[0])
        first, *others = (file.read(stored[name]) for file, stored in self._ranks())
        for rank, other in enumerate(others, start=1):
            if not _equal(first, other):
                raise self._differs(name, rank)
        return first

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Indices `start` to `stop` of dimension `dim`; only what lies in them is read, a share at a time."""
        shape, split = self.shape(name), self._how(name)
        if not 0 <= dim < len(shape) or not 0 <= start <= stop <= shape[dim]:
            raise CheckpointError(f"{name} {list(shape)} has no slice {start}:{stop} of dimension {dim}")
        if split.dim is None:
            return self._read_whole(name, dim, start, stop)
        pieces = list(self._pieces(name, split))
        if dim == split.dim:
            pieces = [clipped for piece in pieces if (clipped := _clip(piece, start, stop)) is not None]
        if len(pieces) == 1 and dim == split.dim == 0:
            (piece,) = pieces
            return self._rows(piece.rank, name, 0, piece.local, piece.local + piece.length)
        sizes = list(shape)
        sizes[dim] = stop - start
        whole = allocate(self.dtype(name), torch.Size(sizes))
        for piece in pieces:
            part = self._rows(piece.rank, name, split.dim, piece.local, piece.local + piece.length)
            if dim == split.dim:
                whole.narrow(dim, piece.start - start, piece.length).copy_(part)
            else:
                whole.narrow(split.dim, piece.start, piece.length).copy_(part.narrow(dim, start, stop - start))
        return whole

    def description(self, name: str) -> list[Any]:
        """What the whole is made of, as plain values: the stored name, how it was split, and into which blocks."""
        return [self._stored[0][name], self._how(name).dim, list(self._blocks.get(name, ()))]

    def is_same(self, name: str, other: str) -> bool:
        """Whether two names are one tensor: stored once, or equal in every number."""
        shares = [(self._share(rank, name), self._share(rank, other)) for rank in range(len(self.files))]
        if all(one == two for one, two in shares):
            return True
        shape, dtype = self.shape(name), self.dtype(name)
        if shape != self.shape(other) or dtype != self.dtype(other):
            return False
        chunks = _chunks(shape, dtype)
        return all(_equal(self.read_slice(name, 0, a, b), self.read_slice(other, 0, a, b)) for a, b in chunks)

    def _ranks(self) -> Iterator[tuple[TorchFile, Mapping[str, str]]]:
        return zip(self.files, self._stored, strict=True)

    def _share(self, rank: int, name: str) -> LegacyTensor:
        if name not in self._stored[rank]:
            raise CheckpointError(f"{self.files[rank].path} has no tensor '{name}'.{nearest(name, self._stored[rank])}")
        return self.files[rank].tensors[self._stored[rank][name]]

    def _rows(self, rank: int, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Part of one rank's share."""
        file, stored = self.files[rank], self._stored[rank][name]
        if dim == 0:
            return file.read_rows(stored, start, stop)
        return file.read(stored).narrow(dim, start, stop - start)

    def _how(self, name: str) -> Split:
        """How a tensor is split; found once, since equal shares may have to be compared."""
        if len(self.files) == 1:
            return _WHOLE
        if name not in self._splits:
            split = next((it for it in (*self._own_splits, *_SPLITS) if it.names.fullmatch(name)), _WHOLE)
            if split.dim is not None and split.dim >= len(self._share(0, name).shape):
                raise CheckpointError(
                    f"'{name}' is {list(self._share(0, name).shape)}, and is split on dimension {split.dim}"
                )
            if split.or_whole and self._is_equal(name):
                split = _WHOLE
            self._splits[name] = split
        return self._splits[name]

    def _is_equal(self, name: str) -> bool:
        """Whether all ranks hold the same."""
        share = self._share(0, name)
        return all(
            _equal(self._rows(0, name, 0, a, b), self._rows(rank, name, 0, a, b))
            for rank in range(1, len(self.files))
            for a, b in _chunks(share.shape, share.dtype)
        )

    def _read_whole(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """A slice of a tensor that every rank has, which must be the same in all of them."""
        first = self._rows(0, name, dim, start, stop)
        for rank in range(1, len(self.files)):
            if dim == 0:
                chunks = _chunks(first.shape, first.dtype)
                same = all(_equal(first[a:b], self._rows(rank, name, 0, start + a, start + b)) for a, b in chunks)
            else:
                same = _equal(first, self._rows(rank, name, dim, start, stop))
            if not same:
                raise self._differs(name, rank)
        return first.contiguous()

    def _differs(self, name: str, rank: int) -> CheckpointError:
        files = f"{self.files[0].path.name} and {self.files[rank].path.name}"
        return CheckpointError(
            f"'{name}' differs between {files}, and it is none of the tensors that SAT splits: the files are of "
            "different runs or steps; or, if a mixin of yours was split, say "
            f"--split '{name}=rows' or '{name}=columns'"
        )

    def _pieces(self, name: str, split: Split) -> Iterator[_Piece]:
        assert split.dim is not None
        ranks, total = len(self.files), self.shape(name)[split.dim]
        sizes = self._blocks.get(name) or [total // split.blocks] * split.blocks
        if len(sizes) == 1 or split.dim != 0:
            sizes = [total]  # cut or not, rows lie one after the other
        if sum(sizes) != total or any(size % ranks for size in sizes):
            raise CheckpointError(
                f"'{name}' has {total} rows over {ranks} ranks, which are no blocks of {list(sizes)}: check the number "
                "of heads, and of heads for keys and values"
            )
        start = local = 0
        for size in sizes:
            length = size // ranks
            for rank in range(ranks):
                yield _Piece(rank, start + rank * length, local, length)
            start, local = start + size, local + length

    def _check_ranks(self) -> None:
        first = self._stored[0].keys()
        for rank, (file, stored) in enumerate(self._ranks()):
            if first != stored.keys():
                name = min(first ^ stored.keys())
                have, lack = (file, self.files[0]) if name in stored else (self.files[0], file)
                raise CheckpointError(f"{have.path.name} holds '{name}' and {lack.path.name} does not; both need it")
            for name in stored:
                ours, theirs = self._share(0, name), self._share(rank, name)
                if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
                    raise CheckpointError(
                        f"the shares of '{name}' are uneven: {list(ours.shape)} {ours.dtype} in "
                        f"{self.files[0].path.name}, {list(theirs.shape)} {theirs.dtype} in {file.path.name}"
                    )


def _clip(piece: _Piece, start: int, stop: int) -> _Piece | None:
    """The part of a piece within a range of the whole."""
    first, last = max(piece.start, start), min(piece.start + piece.length, stop)
    return None if first >= last else _Piece(piece.rank, first, piece.local + first - piece.start, last - first)


def _chunks(shape: torch.Size, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Ranges of rows that are compared together, so that a comparison holds little and ends at the first difference."""
    step = max(1, _CHUNK_BYTES // max(1, math.prod(shape[1:]) * dtype.itemsize))
    return ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same to the bit; a NaN is itself."""
    one, other = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(one, other)
