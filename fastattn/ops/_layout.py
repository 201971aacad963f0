"""The memory layout of results, and whether tensors may be written in place."""

import torch


def is_expanded(t):
    """Whether several elements of a tensor are one number in memory, so that it cannot be written."""
    return 0 in t.stride() and any(step == 0 and size > 1 for size, step in zip(t.shape, t.stride(), strict=True))


def rows_overlap(a, b):
    """Whether the first rows of two tensors share memory, so that writing one changes the other.

    Does not find every overlap. Under torch.compile it only finds that both are the same tensor.
    """
    if a is b or torch.compiler.is_compiling():
        return a is b
    low, high = (a, b) if a.storage_offset() <= b.storage_offset() else (b, a)
    return high.storage_offset() - low.storage_offset() < low.shape[-1] and torch._C._is_alias_of(a, b)


def empty_in_layout(like, last):
    """An empty (batch, heads, seqlen, last) tensor with the stride order of `like`: BSHD in, BSHD out."""
    shape = (*like.shape[:3], last)
    strides = like.stride()[:3]
    order = [0, 1, 2]
    if 0 not in strides:  # an expanded tensor has no stride order to follow
        order.sort(key=lambda dim: -strides[dim])
    inverse = [order.index(dim) for dim in range(3)]
    return like.new_empty([shape[dim] for dim in order] + [last]).permute(*inverse, 3)
