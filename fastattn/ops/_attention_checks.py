"""Argument checks of the attention ops. Each message says what was expected and what was given."""

import itertools
import math

import torch

from fastattn.ops._kinds import (
    FLOAT_DTYPES,
    as_number,
    check_float,
    dtype_or_type,
    is_flag,
    is_integer,
    is_readable,
    numbers,
)  # fmt: skip
from fastattn.ops._random import check_dropout_p


def check_qkv(name, q, k, v, packed):
    """Raise unless q, k and v match each other.

    Returns: (batch or None if packed, n_heads, n_kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v).
    """
    shape_q, shape_k, shape_v, dtype, device = q.shape, k.shape, v.shape, q.dtype, q.device
    dims = 3 if packed else 4
    if (
        not len(shape_q) == len(shape_k) == len(shape_v) == dims
        or dtype not in FLOAT_DTYPES
        or not dtype == k.dtype == v.dtype
        or not device == k.device == v.device
    ):
        _raise_for_qkv(name, q, k, v, packed)
    if packed:
        (seqlen_q, n_heads, head_dim), (seqlen_k, n_kv_heads, head_dim_k) = shape_q, shape_k
        batch = batch_k = batch_v = None
        seqlen_v, heads_v, head_dim_v = shape_v
    else:
        (batch, n_heads, seqlen_q, head_dim), (batch_k, n_kv_heads, seqlen_k, head_dim_k) = shape_q, shape_k
        batch_v, heads_v, seqlen_v, head_dim_v = shape_v
        if batch != batch_k:
            raise ValueError(f"{name}: q, k and v must have the same batch size, got {batch}, {batch_k}, {batch_v}")
    if batch_v != batch_k or heads_v != n_kv_heads or seqlen_v != seqlen_k:
        raise ValueError(
            f"{name}: k and v must agree in all but the last dimension, got {tuple(shape_k)} and {tuple(shape_v)}"
        )
    if head_dim != head_dim_k:
        raise ValueError(f"{name}: q and k must have the same head_dim, got {head_dim} and {head_dim_k}")
    if n_heads != n_kv_heads and (n_kv_heads == 0 or n_heads % n_kv_heads):
        hint = transposed_hint(name, shape_q, shape_k, packed)
        raise ValueError(
            f"{name}: the heads of q must be a multiple of those of k and v, got {n_heads} and {n_kv_heads}{hint}"
        )
    return batch, n_heads, n_kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v


def transposed_hint(name, shape_q, shape_k, packed=False, what="q, k and v"):
    """The end of a message about heads that would fit if the tensors were (batch, seqlen, heads, head_dim), or ""."""
    if packed or len(shape_q) != 4 or not shape_k[2] or shape_q[2] % shape_k[2]:
        return ""
    what = "query, key and value" if name == "scaled_dot_product_attention" else what
    return f"; if they are (batch, seqlen, heads, head_dim), pass transpose(1, 2) of {what}, which costs no copy"


def _mask_hint(label, t, q, full):
    """The end of a message about a mask or bias that would fit as a mask of keys or with q and k transposed, or ""."""
    if t.dim() == 2 and tuple(t.shape) == (full[0], full[3]):
        return f"; for one value per key pass {label}[:, None, None, :]"
    if q.dim() == 4 and t.dim() >= 2 and t.shape[-2] in (1, q.shape[1]) and t.shape[-1] == q.shape[1] != full[3]:
        return "; if q, k and v are (batch, seqlen, heads, head_dim), pass their transpose(1, 2), which costs no copy"
    return ""


def _raise_for_qkv(name, q, k, v, packed):
    labels = ("query", "key", "value") if name == "scaled_dot_product_attention" else ("q", "k", "v")
    for label, t in zip(labels, (q, k, v), strict=True):
        if t.dim() != (3 if packed else 4):
            layout = "(total, heads, head_dim) with cu_seqlens" if packed else "(batch, heads, seqlen, head_dim)"
            raise ValueError(f"{name}: {label} must be {layout}, got shape {tuple(t.shape)}")
        check_float(name, label, t)
        both = f"{labels[0]}, {labels[1]} and {labels[2]}"
        if t.dtype != q.dtype:
            raise TypeError(f"{name}: {both} must have the same dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
        if t.device != q.device:
            raise ValueError(f"{name}: {both} must be on the same device, got {q.device}, {k.device}, {v.device}")


def causal_flag(name, label, bias, causal, seqlen_q, seqlen_k):
    """The value of `causal` that a CausalBias passed as a mask or bias stands for."""
    if causal:
        raise ValueError(f"{name}: CausalBias should not be used with causal={causal!r}, which it replaces")
    if bias.seq_len_q != seqlen_q or bias.seq_len_kv != seqlen_k:
        raise ValueError(
            f"{name}: {label} must be a CausalBias for {seqlen_q} queries and {seqlen_k} keys, got one for"
            f" {bias.seq_len_q} and {bias.seq_len_kv}"
        )
    return "bottom_right" if bias.variant.name == "LOWER_RIGHT" else "top_left"


def check_scores(name, label, t, q, full):
    """Raise unless `t` broadcasts to `full` = (batch, heads, seqlen_q, seqlen_k); returns it with four dimensions."""
    if label == "mask" and t.dtype != torch.bool:
        raise TypeError(f"{name}: mask must be bool, True = attend, got {dtype_or_type(t)}; a float mask is a bias")
    if label == "bias":
        check_float(name, label, t)
    if t.device != q.device:
        raise ValueError(f"{name}: {label} must be on the device of q, {q.device}, got {t.device}")
    dims = t.dim()
    if not 2 <= dims <= 4 or any(
        have != 1 and have != want for have, want in zip(t.shape, full[4 - dims :], strict=True)
    ):
        if name == "scaled_dot_product_attention":
            label = "attn_mask"
        meaning = "bool, True = attend" if t.dtype == torch.bool else "added to the scores"
        raise ValueError(
            f"{name}: {label} ({meaning}) must have 2 to 4 dimensions and broadcast to (batch, heads, seqlen_q,"
            f" seqlen_k) = {tuple(full)}, got {tuple(t.shape)}{_mask_hint(label, t, q, full)}"
        )
    return t if dims == 4 else t[(None,) * (4 - dims)]


def check_int32(name, label, t, q, length):
    """Raise unless `t` is int32 (length,) on the device of q; any length if None."""
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name}: {label} must be an int32 tensor, got {type(t).__name__}")
    if t.dtype != torch.int32:
        raise TypeError(f"{name}: {label} must be int32, got {t.dtype}")
    if t.dim() != 1 or (length is not None and t.shape[0] != length):
        wanted = "one dimension" if length is None else f"shape ({length},)"
        raise ValueError(f"{name}: {label} must have {wanted}, got {tuple(t.shape)}")
    if t.device != q.device:
        raise ValueError(f"{name}: {label} must be on the device of q, {q.device}, got {t.device}")


def check_seqlens_k(name, seqlens_k, q, batch, seqlen_k, cu_seqlens_k):
    """Raise unless the lengths are valid. The values are read only where that needs no device synchronisation."""
    check_int32(name, "seqlens_k", seqlens_k, q, batch)
    if not is_readable(seqlens_k) or (cu_seqlens_k is not None and not is_readable(cu_seqlens_k)):
        return
    lengths = numbers(seqlens_k)
    limits = [seqlen_k] * batch if cu_seqlens_k is None else numbers(cu_seqlens_k.diff())
    if any(not 0 <= length <= limit for length, limit in zip(lengths, limits, strict=True)):
        limit = seqlen_k if cu_seqlens_k is None else f"the lengths of the packed sequences, {limits}"
        raise ValueError(f"{name}: seqlens_k must be from 0 to {limit}, got {lengths}")


def check_cu_seqlens(name, q, cu_seqlens_q, cu_seqlens_k, total_q, total_k, max_seqlen_q, max_seqlen_k):
    """Raise unless both are given and valid. The values are read only where that needs no device synchronisation."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        raise ValueError(f"{name}: cu_seqlens_q and cu_seqlens_k must be given together")
    check_int32(name, "cu_seqlens_q", cu_seqlens_q, q, None)
    check_int32(name, "cu_seqlens_k", cu_seqlens_k, q, cu_seqlens_q.shape[0])
    if cu_seqlens_q.shape[0] == 0:
        raise ValueError(f"{name}: cu_seqlens_q must have batch + 1 elements, got none")
    for side, t, total, longest in (
        ("q", cu_seqlens_q, total_q, max_seqlen_q),
        ("k", cu_seqlens_k, total_k, max_seqlen_k),
    ):
        if not is_readable(t):
            continue
        label, ends = f"cu_seqlens_{side}", numbers(t)
        if ends[0] != 0 or ends[-1] > total or ends != sorted(ends):
            raise ValueError(f"{name}: {label} must increase from 0 to at most the total length {total}, got {ends}")
        lengths = [end - start for start, end in itertools.pairwise(ends)]
        if longest is not None and longest < max(lengths, default=0):
            raise ValueError(
                f"{name}: max_seqlen_{side} must be at least the longest length, {max(lengths)}, got {longest}"
            )


def check_per_head(name, label, t, q, shapes):
    """Raise unless `t` is a float tensor of one of `shapes`; returns it in fp32 (fp64 if q is)."""
    if t.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: {label} must be float32, got {dtype_or_type(t)}")
    # size by size: under torch.compile, tuples of sizes compare unequal if only some of them are symbolic
    if not any(
        t.dim() == len(shape) and all(have == want for have, want in zip(t.shape, shape, strict=True))
        for shape in shapes
    ):
        wanted = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{name}: {label} must have shape {wanted}, got {tuple(t.shape)}")
    if t.device != q.device:
        raise ValueError(f"{name}: {label} must be on the device of q, {q.device}, got {t.device}")
    return t if t.dtype == torch.float32 or q.dtype == torch.float64 else t.float()


def check_numbers(name, softcap, dropout_p, scale):
    """The three as numbers; None switches softcap and dropout off. Raise unless they are finite and in range."""
    if type(softcap) is not float or type(dropout_p) is not float or scale is not None:
        softcap = as_number(name, "softcap", softcap)
        dropout_p = as_number(name, "dropout_p", dropout_p)
        scale = as_number(name, "scale", scale, None, ": multiply q by it and pass scale=1.0")
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"{name}: softcap must be a finite number of at least 0, got {softcap}")
    if dropout_p:
        check_dropout_p(name, dropout_p)
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"{name}: scale must be finite, got {scale}")
    return softcap, dropout_p, scale


def resolve_window(name, causal, window):
    """(window_left, window_right, top_left). Causal means window_right = 0; it also sets the alignment."""
    if (
        causal is not True
        and causal is not False
        and not (causal in ("top_left", "bottom_right") if isinstance(causal, str) else is_flag(causal))
    ):
        raise ValueError(f'{name}: causal must be False, True, "bottom_right" or "top_left", got {causal!r}')
    left = right = -1
    if window is not None:
        if not isinstance(window, (tuple, list)):
            window = window.tolist() if hasattr(window, "tolist") else window  # a torch or numpy array
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise ValueError(f"{name}: window must be a pair (left, right), got {window!r}")
        left, right = (-1 if side is None else side for side in window)
        if not (is_integer(left) and is_integer(right)) or left < -1 or right < -1:
            raise ValueError(f"{name}: window sides must be integers of at least -1 (unlimited), got {window!r}")
    return left, 0 if causal else right, causal == "top_left"
