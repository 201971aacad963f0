"""Sequences as nested tensors, for ops and layers."""

import torch

LENGTHS, OTHERS = (3, 0, 5, 1), (4, 2, 6, 3)
LAYOUTS = (torch.jagged, torch.strided)


def sequences(lengths, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *shape, generator=generator) for n in lengths]


def nest(parts, layout, requires_grad=False):
    return torch.nested.nested_tensor(parts, layout=layout, requires_grad=requires_grad)


def heads(parts, layout, requires_grad=False):
    """(batch, heads, seqlen, head_dim) from parts (seqlen, heads, head_dim), and the leaf that it is a view of."""
    leaf = nest(parts if layout is torch.jagged else [p.transpose(0, 1) for p in parts], layout, requires_grad)
    return (leaf.transpose(1, 2), leaf) if layout is torch.jagged else (leaf, leaf)


def parts_of(nested, transpose=False):
    return [t.transpose(0, 1) if transpose else t for t in nested.unbind()]


def assert_alike(nested, parts, **tolerance):
    found = nested.unbind()
    assert len(found) == len(parts)
    for got, want in zip(found, parts, strict=True):
        torch.testing.assert_close(got, want, **tolerance)


def compiled(function, *inputs):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
