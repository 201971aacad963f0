"""Attention whose forward applies rotary embeddings in every form that our op has, and how to run it."""

import functools

import torch
from rotary_functions import (
    apply_rotary,
    apply_rotary_and_scale,
    apply_rotary_and_sort,
    apply_rotary_backwards,
    apply_rotary_complex,
    apply_rotary_interleaved,
    apply_rotary_of_half_tables,
    apply_rotary_packed,
    apply_rotary_to_a_part,
    apply_rotary_to_one,
)

HEADS, D = 3, 8


def deprecated(function):
    """A decorator as transformers has them: it changes a keyword, and the function is in its closure."""

    @functools.wraps(function)
    def wrapped(self, *args, **kwargs):
        if "hidden" in kwargs:
            kwargs["x"] = kwargs.pop("hidden")
        return function(self, *args, **kwargs)

    return wrapped


class Attention(torch.nn.Module):
    """The scores of attention, on rotated queries and keys."""

    def __init__(self):
        super().__init__()
        self.q, self.k = (torch.nn.Linear(12, HEADS * D) for _ in range(2))

    def projected(self, x):
        return (layer(x).unflatten(-1, (HEADS, D)).transpose(1, 2) for layer in (self.q, self.k))

    @deprecated
    def forward(self, x, cos, sin, *, scale=0.25):
        q, k = apply_rotary(*self.projected(x), cos, sin)
        return q @ k.mT * scale + len(super().extra_repr())


class Swapped(Attention):
    def forward(self, x, cos, sin):
        q, k = apply_rotary(*(t.transpose(1, 2) for t in self.projected(x)), cos, sin, unsqueeze_dim=2)
        return q.transpose(1, 2) @ k.permute(0, 2, 3, 1)


class Partial(Attention):
    def forward(self, x, cos, sin):
        cos, sin = (torch.cat([t[..., :2], t[..., :2]], -1) for t in (cos, sin))
        q, k = apply_rotary_to_a_part(*self.projected(x), cos, sin)
        return q @ k.mT


class Interleaved(Attention):
    def forward(self, x, cos, sin):
        cos, sin = (t.chunk(2, -1)[0].repeat_interleave(2, -1) for t in (cos, sin))
        q, k = apply_rotary_interleaved(*self.projected(x), cos, sin)
        return q @ k.mT


class HalfTables(Attention):
    def forward(self, x, cos, sin):
        q, k = apply_rotary_of_half_tables(*self.projected(x), cos[..., :4], sin[..., :4])
        return q @ k.mT


class Packed(Attention):
    def forward(self, x, cos, sin):
        q, k = apply_rotary_packed(*(t[0].transpose(0, 1) for t in self.projected(x)), cos[0], sin[0])
        return q.transpose(0, 1) @ k.permute(1, 2, 0)


class Backwards(Attention):
    def forward(self, x, cos, sin):
        q, k = apply_rotary_backwards(*self.projected(x), cos, sin)
        return q @ k.mT


class Sorted(Attention):
    def forward(self, x, cos, sin):
        q, k = apply_rotary_and_sort(*self.projected(x), cos, sin)
        return q @ k.mT


class OneByOne(Attention):
    def forward(self, x, cos, sin):
        q, k = (t.transpose(1, 2) for t in self.projected(x))
        q, k = (apply_rotary_to_one(t, cos=cos[..., :4], sin=sin[..., :4]) for t in (q, k))
        return q.transpose(1, 2) @ k.permute(0, 2, 3, 1)


class Complex(Attention):
    def forward(self, x, cos, sin):
        q, k = (t.transpose(1, 2) for t in self.projected(x))
        q, k = apply_rotary_complex(q, k, torch.complex(cos[..., :4].float(), sin[..., :4].float()))
        return q.transpose(1, 2) @ k.permute(0, 2, 3, 1)


class Scaled(Attention):
    def forward(self, x, cos, sin):
        q, k = apply_rotary_and_scale(*self.projected(x), cos, sin)
        return q @ k.mT


CLASSES = (Attention, Swapped, Partial, Interleaved, HalfTables, Packed, Backwards, Sorted, OneByOne, Complex)


def case(kind=Attention, rows=2, dtype=torch.float32):
    torch.manual_seed(0)
    table_rows = torch.randn(rows, 5, D // 2)
    cos, sin = (f(torch.cat([table_rows, table_rows], -1)).to(dtype) for f in (torch.cos, torch.sin))
    return kind().to(dtype), torch.randn(2, 5, 12, dtype=dtype), cos, sin


def run(module, *given, **named):
    module.zero_grad()
    out = module(*given, **named)
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))
    return [out.detach(), *(p.grad.clone() for p in module.parameters())]


def same_bits(a, b):
    return all(map(torch.equal, a, b))
