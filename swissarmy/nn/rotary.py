"""Rotary position embedding (Su et al. 2021) and every published way to stretch it.

Shapes: b batch, s positions, r rotary size (even; at most the head size).
Frequencies and angles are float32 whatever the model's precision, as the references have them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from swissarmy.core.config import Config
from swissarmy.core.errors import ConfigError

RopeType = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"]


@final
@dataclass(frozen=True, kw_only=True)
class RopeParameters(Config):
    """Frequencies of a rotary embedding, in the terms of Hugging Face's `rope_parameters`."""

    rope_type: RopeType = "default"
    """How positions beyond the trained length are handled."""
    rope_theta: float = 10000.0
    """The base of the frequencies."""
    partial_rotary_factor: float = 1.0
    """The share of each head that is rotated."""
    factor: float | None = None
    """How much longer than trained the sequences may be."""
    original_max_position_embeddings: int | None = None
    """The trained length."""
    attention_factor: float | None = None
    """What cosines and sines are multiplied by (yarn, longrope); computed when `None`."""
    beta_fast: float | None = None
    """Yarn: rotations above which a frequency is left alone; 32 when `None`."""
    beta_slow: float | None = None
    """Yarn: rotations below which a frequency is fully interpolated; 1 when `None`."""
    mscale: float | None = None
    """Yarn: numerator of the attention factor, as DeepSeek defines it."""
    mscale_all_dim: float | None = None
    """Yarn: denominator of the attention factor."""
    truncate: bool = True
    """Yarn: whether the bounds of the ramp are rounded to whole dimensions."""
    short_factor: tuple[float, ...] | None = None
    """Longrope: divisors of the frequencies up to the trained length."""
    long_factor: tuple[float, ...] | None = None
    """Longrope: divisors beyond it."""
    low_freq_factor: float | None = None
    """Llama3: wavelengths longer than trained length / this are interpolated."""
    high_freq_factor: float | None = None
    """Llama3: wavelengths shorter than trained length / this are left alone."""

    def problems(self) -> Iterator[str]:
        """Say which field a rope type lacks."""
        needs: dict[str, tuple[str, ...]] = {
            "linear": ("factor",),
            "dynamic": ("factor",),
            "yarn": ("factor",),
            "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        }
        for name in needs.get(self.rope_type, ()):
            if getattr(self, name) is None:
                yield f"rope_type='{self.rope_type}' needs {name}"


@final
class RotaryFrequencies:
    """Cosines and sines of one set of rope parameters: `positions [b, s] -> (cos, sin)`, each `[b, 1, s, r]`."""

    def __init__(self, parameters: RopeParameters, head_dim: int, max_positions: int) -> None:
        """Compute the frequencies.

        Args:
            parameters: Which frequencies.
            head_dim: The size of a head.
            max_positions: The model's maximum length, which dynamic and yarn scaling fall back on.
        """
        self.parameters = parameters
        self.rotary_dim = int(head_dim * parameters.partial_rotary_factor)
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ConfigError(f"{self.rotary_dim} of {head_dim} dimensions are rotated; the number must be even.")
        self.trained_length = parameters.original_max_position_embeddings or max_positions
        self.max_positions = max_positions
        self.attention_factor = self._attention_factor()
        self.inverse = tuple(self._inverse_frequencies().tolist())
        self.inverse_long = self._longrope_frequencies()

    def __call__(self, position_ids: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
        """The rotation of each position; pairs are halves of the head, or neighbours."""
        inverse = torch.tensor(self.inverse, dtype=torch.float32, device=position_ids.device)
        if self.parameters.rope_type == "dynamic":
            inverse = self._stretched(position_ids)
        if self.inverse_long is not None:
            long = torch.tensor(self.inverse_long, dtype=torch.float32, device=position_ids.device)
            inverse = torch.where(position_ids.max() + 1 > self.trained_length, long, inverse)
        angles = position_ids[:, None, :, None].float() * inverse
        angles = angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor

    def _stretched(self, position_ids: Tensor) -> Tensor:
        """Dynamic NTK scaling: the base grows with the sequence once it is longer than trained."""
        factor, r = self.parameters.factor or 1.0, self.rotary_dim
        length = (position_ids.max() + 1).clamp(min=self.max_positions)
        growth = (factor * length / self.max_positions) - (factor - 1)
        base = self.parameters.rope_theta * growth ** (r / (r - 2))
        return 1.0 / (base ** (torch.arange(0, r, 2, device=position_ids.device).float() / r))

    def _powers(self) -> Tensor:
        """`theta^(2i/r)` for each pair of dimensions."""
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.int64, device="cpu").float() / self.rotary_dim
        powers: Tensor = self.parameters.rope_theta**exponents
        return powers

    def _inverse_frequencies(self) -> Tensor:
        p, powers = self.parameters, self._powers()
        if p.rope_type == "linear":
            return 1.0 / powers / (p.factor or 1.0)
        if p.rope_type == "yarn":
            return self._yarn(powers)
        if p.rope_type == "longrope":
            return 1.0 / (torch.tensor(p.short_factor, dtype=torch.float32, device="cpu") * powers)
        if p.rope_type == "llama3":
            return self._llama3(1.0 / powers)
        return 1.0 / powers

    def _longrope_frequencies(self) -> tuple[float, ...] | None:
        if self.parameters.long_factor is None or self.parameters.rope_type != "longrope":
            return None
        factors = torch.tensor(self.parameters.long_factor, dtype=torch.float32, device="cpu")
        return tuple((1.0 / (factors * self._powers())).tolist())

    def _yarn(self, powers: Tensor) -> Tensor:
        """Interpolate slow dimensions, keep fast ones, ramp in between (Peng et al. 2023)."""
        p, r = self.parameters, self.rotary_dim

        def dimension_of(rotations: float) -> float:
            return r * math.log(self.trained_length / (rotations * 2 * math.pi)) / (2 * math.log(p.rope_theta))

        low, high = dimension_of(p.beta_fast or 32.0), dimension_of(p.beta_slow or 1.0)
        if p.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, r - 1)
        width = high - low if high != low else 0.001
        ramp = ((torch.arange(r // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
        keep = 1 - ramp
        return 1.0 / (self._factor() * powers) * (1 - keep) + 1.0 / powers * keep

    def _llama3(self, inverse: Tensor) -> Tensor:
        """Interpolate long wavelengths, keep short ones, blend in between (Llama 3.1)."""
        p = self.parameters
        low, high, factor = p.low_freq_factor or 1.0, p.high_freq_factor or 1.0, p.factor or 1.0
        wavelength = 2 * math.pi / inverse
        blend = (self.trained_length / wavelength - low) / (high - low)
        scaled = torch.where(wavelength > self.trained_length / low, inverse / factor, inverse)
        blended = (1 - blend) * scaled / factor + blend * scaled
        between = (wavelength >= self.trained_length / high) & (wavelength <= self.trained_length / low)
        return torch.where(between, blended, scaled)

    def _factor(self) -> float:
        """The stretch, from the ratio of lengths where the checkpoint gives the trained one."""
        if self.parameters.factor is not None:
            return self.parameters.factor
        return self.max_positions / self.trained_length

    def _attention_factor(self) -> float:
        p = self.parameters
        if p.rope_type not in ("yarn", "longrope"):
            return 1.0
        if p.attention_factor is not None:
            return p.attention_factor
        factor = self._factor()
        if p.rope_type == "longrope":
            return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(self.trained_length))
        if p.mscale and p.mscale_all_dim:
            return _yarn_scale(factor, p.mscale) / _yarn_scale(factor, p.mscale_all_dim)
        return _yarn_scale(factor, 1.0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the first `r` dimensions of each head, `[b, heads, s, d]`; the others pass."""
    r = cos.shape[-1]
    head, rest = (x, None) if r == x.shape[-1] else (x[..., :r], x[..., r:])
    if interleaved:
        turned = torch.stack((-head[..., 1::2], head[..., ::2]), dim=-1).flatten(-2)
    else:
        turned = torch.cat((-head[..., r // 2 :], head[..., : r // 2]), dim=-1)
    rotated = head * cos + turned * sin
    return rotated if rest is None else torch.cat((rotated, rest), dim=-1)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
