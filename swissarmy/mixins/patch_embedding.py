"""Images as tokens (ViT, Dosovitskiy et al. 2021): patches, class tokens, and positions that fit any grid.

`PatchEmbeddingMixin`. Hooks: `word_embedding_forward` (replaces); reads `pixel_values` `[b, channels, height, width]`.
Parameters: `projection.*` (a convolution), `first_tokens.{i}` `[h]`.
`InterpolatedPositionsMixin`. Hooks: `position_embedding_forward` (replaces). Parameters: `first` `[n, h]`,
`table` `[rows * columns, h]`.
"""

from collections.abc import Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swissarmy.core.errors import HookCallError
from swissarmy.core.mixin import BaseMixin


@final
class PatchEmbeddingMixin(BaseMixin):
    """A vector for each patch of an image, after one or more trained ones (class, distillation)."""

    def __init__(
        self, hidden_size: int, patch_size: Sequence[int], *, channels: int = 3, num_first_tokens: int = 1
    ) -> None:
        """Make the projection; `patch_size` is (height, width) in pixels."""
        super().__init__()
        self.patch_size, self.channels = (patch_size[0], patch_size[1]), channels
        self.projection = nn.Conv2d(channels, hidden_size, kernel_size=self.patch_size, stride=self.patch_size)
        self.first_tokens = nn.ParameterList(torch.empty(hidden_size) for _ in range(num_first_tokens))
        for weight in (self.projection.weight, *self.first_tokens):
            nn.init.normal_(weight, std=0.02)

    @property
    def saved_options(self) -> dict[str, Any]:
        """What it was made with."""
        return {
            "hidden_size": self.projection.out_channels,
            "patch_size": list(self.patch_size),
            "channels": self.channels,
            "num_first_tokens": len(self.first_tokens),
        }

    def word_embedding_forward(
        self, input_ids: Tensor | None, *, pixel_values: Tensor | None = None, **kw_args: Any
    ) -> Tensor:
        """`[b, channels, height, width]` to `[b, first tokens + patches, h]`; sizes divisible by the patch."""
        if pixel_values is None or pixel_values.dim() != 4:
            given = "none" if pixel_values is None else f"pixel_values of shape {list(pixel_values.shape)}"
            raise HookCallError(
                f"this model sees images: call it with pixel_values=[b, channels, height, width]; {given} given."
            )
        b, channels, height, width = pixel_values.shape
        rows, columns = self.patch_size
        if channels != self.channels or height % rows or width % columns:
            raise HookCallError(
                f"pixel_values of {channels} x {height} x {width}: this model takes {self.channels} channels, and "
                f"sizes divisible by its patch of {rows} x {columns}."
            )
        kw_args["output_cross_layer"]["patch_grid"] = (height // rows, width // columns)
        patches = self.projection(pixel_values.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)
        first = [token.expand(b, 1, -1) for token in self.first_tokens]
        return torch.cat((*first, patches), dim=1)


@final
class InterpolatedPositionsMixin(BaseMixin):
    """A trained vector for each cell of a grid, stretched bicubically where an image has another one."""

    def __init__(self, hidden_size: int, grid: Sequence[int], *, num_first_tokens: int = 1) -> None:
        """Make the table; `grid` is (rows, columns) in patches."""
        super().__init__()
        self.grid = (grid[0], grid[1])
        self.first = nn.Parameter(torch.zeros(num_first_tokens, hidden_size))
        self.table = nn.Parameter(torch.zeros(grid[0] * grid[1], hidden_size))
        for vectors in (self.first, self.table):
            nn.init.normal_(vectors, std=0.02)
            # as of any embedding; they are no `nn.Embedding` only for their shape
            vectors.no_weight_decay = True  # type: ignore[attr-defined]

    @property
    def saved_options(self) -> dict[str, Any]:
        """What it was made with."""
        return {
            "hidden_size": self.table.shape[1],
            "grid": list(self.grid),
            "num_first_tokens": len(self.first),
        }

    def position_embedding_forward(self, position_ids: Tensor, **kw_args: Any) -> Tensor:
        """The positions of this call's grid, `[1, first tokens + patches, h]`."""
        grid = kw_args["output_cross_layer"].get("patch_grid")
        if grid is None:
            raise HookCallError("these positions are of a grid of patches: add a PatchEmbeddingMixin too.")
        table = interpolate(self.table, self.grid, grid)
        return torch.cat((self.first, table))[None]

    def resize(self, grid: tuple[int, int]) -> None:
        """Make the stretched table the table itself, for training at another size."""
        with torch.no_grad():
            self.table = nn.Parameter(interpolate(self.table, self.grid, grid).clone())
        self.grid = grid


def interpolate(table: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """A table of positions `[rows * columns, h]` on another grid, bicubic."""
    if grid == target:
        return table
    image = table.view(1, *grid, -1).permute(0, 3, 1, 2)
    stretched = F.interpolate(image, size=target, mode="bicubic", align_corners=False)
    return stretched.permute(0, 2, 3, 1).flatten(0, 2)
