"""The random state of an op with dropout: (seed, offset), drawn from PyTorch's generator."""

import torch
from torch._subclasses.fake_tensor import FakeTensor

from fastattn.ops._kinds import as_number

_LEAST, _MOST = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max


def draw_rng(where, states=None):
    """Draw int64 (2,) from the generator of a device. Reproducible with torch.manual_seed, safe in CUDA graphs.

    Args:
        where: a device or a tensor, which may be fake.
        states: None, or how many states to draw: (states, 2), on a CPU the same numbers as that many calls.
    """
    if type(where) is torch.Tensor:
        where = where.device
    elif isinstance(where, FakeTensor):
        with where.fake_mode:
            return draw_rng(where.device, states)
    device = where.device if isinstance(where, torch.Tensor) else where
    size = (2,) if states is None else (states, 2)
    return torch.randint(_LEAST, _MOST, size, dtype=torch.int64, device=device)


def check_dropout_p(name, dropout_p, label="dropout_p"):
    """Return dropout_p as a number, None as 0. Raise ValueError unless it is a probability."""
    dropout_p = as_number(name, label, dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{name}: {label} must be between 0 and 1, got {dropout_p}")
    return dropout_p
