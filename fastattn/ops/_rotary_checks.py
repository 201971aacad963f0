"""The checks of rotary_embedding: dtypes, shapes and devices of the tensors, the tables and the positions."""

import torch

from fastattn.ops._kinds import FLOAT_DTYPES, check_float, is_readable, numbers
from fastattn.ops._layout import is_expanded, rows_overlap


def fail(expected, got):
    raise ValueError(f"rotary_embedding: {expected}, got {got}")


def check_inputs(xs, inplace):
    """(batch, seqlen, head_dim) of one or two tensors. Raise unless they match each other."""
    first = xs[0]
    dims = first.dim()
    if dims not in (3, 4):
        fail("x must be (batch, n_heads, seqlen, head_dim) or (total, n_heads, head_dim)", tuple(first.shape))
    for x in xs:
        if x.dtype not in FLOAT_DTYPES:
            check_float("rotary_embedding", "x", x)
        if inplace and is_expanded(x) and x.numel():
            fail("an expanded x cannot be rotated in place", f"strides {x.stride()}")
    if len(xs) == 2:
        a, b = first.shape, xs[1].shape
        if len(a) != len(b) or a[0] != b[0] or a[2:] != b[2:]:
            fail("the two tensors must agree in all but the number of heads", f"{tuple(a)} and {tuple(b)}")
        if xs[1].dtype != first.dtype or xs[1].device != first.device:
            fail(
                "the two tensors must have the same dtype and device",
                f"{first.dtype} on {first.device} and {xs[1].dtype} on {xs[1].device}",
            )
        if inplace and first.numel() and xs[1].numel() and rows_overlap(first, xs[1]):
            fail("the two tensors must not share memory if they are rotated in place", "overlapping ones")
    return (1, *first.shape[::2]) if dims == 3 else (first.shape[0], *first.shape[2:])


def check_tables(x, cos, sin, batch, seqlen, head_dim, interleaved):
    """rotary_dim, derived from the shape of the tables."""
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        fail(
            "cos and sin must have the same shape and dtype",
            f"{tuple(cos.shape)} {cos.dtype} and {tuple(sin.shape)} {sin.dtype}",
        )
    if cos.device != x.device or sin.device != x.device:
        fail(f"cos and sin must be on the device of x, {x.device}", f"{cos.device} and {sin.device}")
    if cos.dtype not in FLOAT_DTYPES:
        check_float("rotary_embedding", "cos and sin", cos)
    dims, width = cos.dim(), cos.shape[-1] if cos.dim() else 0
    if dims == 2 and 0 < 2 * width <= head_dim:
        return 2 * width
    full = (dims == 2 and width == head_dim) or (dims == 3 and width <= head_dim)
    if not full or width % 2 or not width:
        fail(
            f"cos and sin must be (max_seqlen, rotary_dim / 2), (seqlen, {head_dim}) or (batch, seqlen, rotary_dim)"
            f" with an even rotary_dim of at most head_dim = {head_dim}",
            tuple(cos.shape),
        )
    if interleaved:
        fail("interleaved needs tables (max_seqlen, rotary_dim / 2): doubled ones are ambiguous", tuple(cos.shape))
    if dims == 3 and (cos.shape[0] not in (1, batch) or cos.shape[1] != seqlen):
        fail(f"cos and sin must have {batch} or 1 rows of {seqlen} tokens, like x", tuple(cos.shape))
    return width


def check_positions(x, positions, cos, batch, seqlen):
    """(positions or None, offset)."""
    if cos.dim() == 3:
        if positions is not None:
            fail("positions must be None if cos and sin have a row per token", f"{positions!r}")
        return None, 0
    rows = cos.shape[0]
    if not isinstance(positions, torch.Tensor):
        offset = 0 if positions is None else positions
        if isinstance(offset, (bool, float)):
            raise TypeError(f"rotary_embedding: positions must be None, an int or an integer tensor, got {offset!r}")
        if offset < 0 or offset + seqlen > rows:
            fail(f"positions must lie within the {rows} rows of cos", f"{offset} to {offset + seqlen - 1}")
        return None, offset
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"rotary_embedding: positions must be int32 or int64, got {positions.dtype}")
    if positions.device != x.device:
        fail(f"positions must be on the device of x, {x.device}", positions.device)
    shape = tuple(positions.shape)
    # tuples of different lengths are not compared: their first sizes would become a guard of an exported program
    if len(shape) not in (1, 2) or shape[-1] != seqlen or (len(shape) == 2 and shape[0] not in (1, batch)):
        fail(f"positions must have shape ({seqlen},) or ({batch}, {seqlen}), like the tokens of x", shape)
    if positions.numel() and is_readable(positions):
        low, high = (numbers(bound) for bound in positions.aminmax())
        if low < 0 or high >= rows:
            fail(f"positions must lie within the {rows} rows of cos", f"{low} to {high}")
    return positions, 0
