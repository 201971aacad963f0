"""The angles of rotary positions: their base, and how they are stretched for texts longer than in pretraining."""

import math
from dataclasses import dataclass

import torch

from fastattn.nn import RotaryEmbedding

SCALINGS = ("none", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RotaryConfig:
    """The angles of rotary positions.

    Args:
        base: ratio of the longest to the shortest wavelength
        local_base: base of layers with a window, whose angles are never scaled; null = base, and scaled like all others
        scaling: none; linear divides all angles by factor; llama3 divides only those of long wavelengths; yarn does so
            too, and also lengthens queries and keys
        factor: how many times longer the text may be than original_length
        original_length: tokens of the longest text before scaling; llama3 and yarn
        low_frequency: llama3 scales wavelengths above original_length / low_frequency; yarn scales pairs that turn
            fewer times than this in original_length
        high_frequency: llama3 keeps wavelengths below original_length / high_frequency; yarn keeps pairs that turn more
            often than this
        attention_factor: factor of rotated queries and keys with yarn; null = 0.1 * ln(factor) + 1
    Raises:
        ValueError: a name is unknown or a number is out of range.
    Sources: Chen et al., "Extending context window of large language models via positional interpolation", 2023
        (linear); Llama team, "The Llama 3 herd of models", 2024, and their code; Peng et al., "YaRN", 2023.
    """

    base: float = 10000.0
    local_base: float | None = None
    scaling: str = "none"
    factor: float = 1.0
    original_length: int = 8192
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.scaling not in SCALINGS:
            raise ValueError(f"rotary.scaling must be one of {', '.join(SCALINGS)}, got {self.scaling!r}")
        for name in ("base", "local_base", "factor", "original_length", "low_frequency", "attention_factor"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"rotary.{name} must be a finite number above 0, got {value}")
        if not self.low_frequency < self.high_frequency < math.inf:
            raise ValueError(
                f"rotary.high_frequency must be above low_frequency = {self.low_frequency}, got {self.high_frequency}"
            )


class ScaledRotary(RotaryEmbedding):
    """A RotaryEmbedding with the angles of a RotaryConfig.

    Args:
        rotary_dim, max_seqlen: as for RotaryEmbedding.
        config: RotaryConfig.
    """

    def __init__(self, rotary_dim: int, max_seqlen: int, config: RotaryConfig) -> None:
        self.config = config
        super().__init__(rotary_dim, max_seqlen=max_seqlen, base=config.base)

    def _make(self, rows, device):
        frequency, factor = scaled_frequencies(self.rotary_dim, self.config)
        position = torch.arange(rows, dtype=torch.float64, device=device)
        angle = torch.outer(position, frequency.to(device))
        return (angle.cos() * factor).float(), (angle.sin() * factor).float()


def make_rotary(rotary_dim, max_seqlen, config):
    """The rotary embedding of a RotaryConfig."""
    if config.scaling == "none":
        return RotaryEmbedding(rotary_dim, max_seqlen=max_seqlen, base=config.base)
    return ScaledRotary(rotary_dim, max_seqlen, config)


def scaled_frequencies(rotary_dim, config):
    """(angle per position of each pair, fp64 (rotary_dim / 2,), factor of rotated vectors)."""
    pair = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    frequency = config.base**-pair
    scaled = frequency / config.factor
    if config.scaling == "linear":
        return scaled, 1.0
    if config.scaling == "llama3":
        turns = config.original_length * frequency / (2 * math.pi)
        kept = (turns - config.low_frequency) / (config.high_frequency - config.low_frequency)
        return torch.lerp(scaled, frequency, kept.clamp(0, 1)), 1.0

    def pair_of(turns):  # the number of the pair that turns so often in original_length, a fraction
        return rotary_dim * math.log(config.original_length / (turns * 2 * math.pi)) / (2 * math.log(config.base))

    first = max(math.floor(pair_of(config.high_frequency)), 0)
    last = min(math.ceil(pair_of(config.low_frequency)), rotary_dim - 1)
    ramp = (torch.arange(rotary_dim // 2, dtype=torch.float64) - first) / max(last - first, 0.001)
    factor = config.attention_factor
    if factor is None:
        factor = 0.1 * math.log(config.factor) + 1 if config.factor > 1 else 1.0
    return torch.lerp(frequency, scaled, ramp.clamp(0, 1)), factor
