"""Tables and compositions that the tests of rotary_embedding share."""

import torch

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def tables(rows, rotary_dim, dtype=FP32, device="cpu"):
    inv_freq = 10000.0 ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angle = torch.outer(torch.arange(rows, dtype=torch.float64), inv_freq)
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def randn(*shape, dtype=FP32, device="cpu", seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def rotate_half(x, cos, sin):
    """The composition of Hugging Face, with doubled tables."""
    x1, x2 = x.chunk(2, -1)
    return x * cos + torch.cat((-x2, x1), -1) * sin


def doubled(t):
    return torch.cat((t, t), -1)
