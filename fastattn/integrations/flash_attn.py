"""The functions of flash-attn 2.8 on fastattn's kernels: the same arguments in the same order and meaning.

    from fastattn.integrations.flash_attn import flash_attn_func  # instead of: from flash_attn import flash_attn_func

Tensors are (batch, seqlen, heads, head_dim), packed sequences (total, heads, head_dim), and reach the kernels as views.
causal and window_size are aligned bottom-right. docs/flash-attn.md lists the differences and their tests.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastattn.ops._attention_checks import check_int32, resolve_window
from fastattn.ops._public import Public
from fastattn.ops.attention import attention
from fastattn.ops.attention_decode import attention_decode
from fastattn.ops.rotary import rotary_embedding

_TENSORS = (
    "q k v kv qkv k_cache v_cache cu_seqlens cu_seqlens_q cu_seqlens_k alibi_slopes rotary_cos rotary_sin"
    " cache_batch_idx cache_leftpad cache_seqlens block_table"
)
# argument names of our ops → their names here, for error messages
_INNER_NAMES = {"scale": "softmax_scale", "window": "window_size", "cos": "rotary_cos", "sin": "rotary_sin"}
_SELF_ATTENTION_NAMES = {"cu_seqlens_q": "cu_seqlens", "max_seqlen_q": "max_seqlen"}
_BATCHED = ("batch", "seqlen", "heads", "head_dim")
_PACKED = ("total", "heads", "head_dim")
_Function = TypeVar("_Function", bound=Callable)


def _named(function: _Function) -> _Function:
    public = Public(
        function.__name__,
        tensors=_TENSORS,
        numbers="dropout_p softmax_scale softcap",
        integers="num_splits cache_seqlens max_seqlen max_seqlen_q max_seqlen_k",
        flags="deterministic return_attn_probs return_softmax_lse rotary_interleaved",
        inner=_INNER_NAMES
        if "max_seqlen_q" in signature(function).parameters
        else _INNER_NAMES | _SELF_ATTENTION_NAMES,
    )
    return public.answering(function)


def _check_layout(name, layout, **tensors):
    """Raise ValueError unless every tensor has the dimensions of `layout`, in which an int is a required size."""
    for label, t in tensors.items():
        if t.dim() != len(layout) or any(
            isinstance(want, int) and have != want for have, want in zip(t.shape, layout, strict=True)
        ):
            raise ValueError(f"{name}: {label} must be ({', '.join(map(str, layout))}), got shape {tuple(t.shape)}")


@_named
def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:  # fmt: skip
    """`attention` with the signature of flash-attn.

    Args:
        q: (batch, seqlen_q, n_heads, head_dim), float32, bfloat16 or float16.
        k: (batch, seqlen_k, n_kv_heads, head_dim), v: (batch, seqlen_k, n_kv_heads, head_dim_v).
        dropout_p: always applied, also in evaluation.
        softmax_scale: default 1 / sqrt(head_dim).
        causal: query i sees keys up to i + seqlen_k - seqlen_q.
        window_size: (left, right): keys i + seqlen_k - seqlen_q - left to i + seqlen_k - seqlen_q + right, -1 = all.
        softcap: scores become softcap * tanh(score / softcap); 0 = off.
        alibi_slopes: float32 (n_heads,) or (batch, n_heads): slope * |i + seqlen_k - seqlen_q - j| is subtracted.
        deterministic: as in `attention`; False means None there: torch.use_deterministic_algorithms decides.
        return_attn_probs: return (out, softmax_lse, None); softmax_lse is float32 (batch, n_heads, seqlen_q) and
            differentiable. The weights, S_dmask in flash-attn, are never stored.
    Returns: out (batch, seqlen_q, n_heads, head_dim_v) in the layout of q.
    Raises:
        ValueError, TypeError: as `attention`.
    Source: flash-attn 2.8, `flash_attn_func`.
    Example:
        >>> from fastattn.integrations.flash_attn import flash_attn_func
        >>> q, k = torch.randn(2, 100, 8, 64), torch.randn(2, 100, 2, 64)
        >>> flash_attn_func(q, k, k, causal=True, window_size=(32, 0)).shape
        torch.Size([2, 100, 8, 64])
    """
    _check_layout("flash_attn_func", _BATCHED, q=q, k=k, v=v)
    out, lse = attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal, window=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, dropout_p=dropout_p, scale=softmax_scale, deterministic=deterministic or None,
        return_lse=True,
    )  # fmt: skip
    out = out.transpose(1, 2)
    return (out, lse, None) if return_attn_probs else out


@_named
def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:  # fmt: skip
    """`flash_attn_func` with keys and values in one tensor (batch, seqlen_k, 2, n_kv_heads, head_dim).

    Example:
        >>> from fastattn.integrations.flash_attn import flash_attn_kvpacked_func
        >>> flash_attn_kvpacked_func(torch.randn(2, 100, 8, 64), torch.randn(2, 100, 2, 2, 64)).shape
        torch.Size([2, 100, 8, 64])
    """
    _check_layout("flash_attn_kvpacked_func", ("batch", "seqlen", 2, "heads", "head_dim"), kv=kv)
    k, v = kv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


@_named
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:  # fmt: skip
    """`flash_attn_func` with all three in one tensor (batch, seqlen, 3, n_heads, head_dim).

    Example:
        >>> from fastattn.integrations.flash_attn import flash_attn_qkvpacked_func
        >>> flash_attn_qkvpacked_func(torch.randn(2, 100, 3, 8, 64), causal=True).shape
        torch.Size([2, 100, 8, 64])
    """
    _check_layout("flash_attn_qkvpacked_func", ("batch", "seqlen", 3, "heads", "head_dim"), qkv=qkv)
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


@_named
def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:  # fmt: skip
    """`flash_attn_func` on packed sequences, each aligned by its own lengths.

    Args:
        q: (total_q, n_heads, head_dim); k: (total_k, n_kv_heads, head_dim), v: (total_k, n_kv_heads, head_dim_v).
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,): sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]; it may be
            empty.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths.
        block_table: must be None.
        The others are as in `flash_attn_func`.
    Returns: out (total_q, n_heads, head_dim_v); with return_attn_probs (out, softmax_lse, None), softmax_lse float32
        (n_heads, total_q), as since flash-attn 2.6.
    Raises:
        ValueError, TypeError: as `attention`.
    Source: flash-attn 2.8, `flash_attn_varlen_func`.
    Example:
        >>> from fastattn.integrations.flash_attn import flash_attn_varlen_func
        >>> q = torch.randn(12, 8, 64)  # a sequence of 5 tokens, then one of 7
        >>> ends = torch.tensor([0, 5, 12], dtype=torch.int32)
        >>> flash_attn_varlen_func(q, q, q, ends, ends, 7, 7, causal=True).shape
        torch.Size([12, 8, 64])
    """
    if block_table is not None:
        raise ValueError(
            "flash_attn_varlen_func: block_table must be None, got a tensor; use flash_attn_with_kvcache for a paged"
            " cache"
        )
    _check_layout("flash_attn_varlen_func", _PACKED, q=q, k=k, v=v)
    out, lse = attention(
        q, k, v, causal=causal, window=window_size, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, softcap=softcap, alibi_slopes=alibi_slopes,
        dropout_p=dropout_p, scale=softmax_scale, deterministic=deterministic or None, return_lse=True,
    )  # fmt: skip
    return (out, lse, None) if return_attn_probs else out


@_named
def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:  # fmt: skip
    """`flash_attn_varlen_func` with keys and values in one tensor (total_k, 2, n_kv_heads, head_dim).

    Example:
        >>> from fastattn.integrations.flash_attn import flash_attn_varlen_kvpacked_func
        >>> ends = torch.tensor([0, 5, 12], dtype=torch.int32)
        >>> flash_attn_varlen_kvpacked_func(torch.randn(12, 8, 64), torch.randn(12, 2, 2, 64), ends, ends, 7, 7).shape
        torch.Size([12, 8, 64])
    """
    _check_layout("flash_attn_varlen_kvpacked_func", ("total", 2, "heads", "head_dim"), kv=kv)
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


@_named
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:  # fmt: skip
    """`flash_attn_varlen_func` with all three in one tensor (total, 3, n_heads, head_dim).

    Example:
        >>> from fastattn.integrations.flash_attn import flash_attn_varlen_qkvpacked_func
        >>> ends = torch.tensor([0, 5, 12], dtype=torch.int32)
        >>> flash_attn_varlen_qkvpacked_func(torch.randn(12, 3, 8, 64), ends, 7, causal=True).shape
        torch.Size([12, 8, 64])
    """
    _check_layout("flash_attn_varlen_qkvpacked_func", ("total", 3, "heads", "head_dim"), qkv=qkv)
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


@_named
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int | None = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention_decode` with the signature of flash-attn: attention to a cache, which k and v extend in place.

    Args:
        q: (batch, seqlen_q, n_heads, head_dim), float32, bfloat16 or float16.
        k_cache, v_cache: (batch_cache, seqlen_cache, n_kv_heads, head_dim); with block_table (num_blocks, block_size,
            n_kv_heads, head_dim), block_size at least 16.
        k, v: (batch, seqlen_new, n_kv_heads, head_dim), written after the cache_seqlens valid keys of each sequence.
        rotary_cos, rotary_sin: (seqlen_ro, rotary_dim / 2): k, whose position is cache_seqlens + i, is rotated before
            it is written, and q likewise; without causal and window_size all queries are at position cache_seqlens.
        cache_seqlens: int32 (batch,) or an int for all: valid keys before this call; None = the whole cache is valid.
        cache_batch_idx: int32 (batch,): rows of the caches, distinct where k is given; not together with block_table.
        cache_leftpad: int32 (batch,): earlier keys are invisible; positions still count from the start of the cache.
        block_table: int32 (batch, max_blocks): block n of sequence b is block_table[b, n].
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`, aligned to the last valid
            key, which includes the new ones.
        rotary_interleaved: rotate dimensions 0 and 1, 2 and 3, ..., else 0 and rotary_dim / 2, 1 and ....
        num_splits: parts of the keys processed in parallel; 0 = automatic.
        return_softmax_lse: return (out, softmax_lse) with softmax_lse float32 (batch, n_heads, seqlen_q).
    Returns: out (batch, seqlen_q, n_heads, head_dim_v) in the layout of q.
    Raises:
        ValueError, TypeError, RuntimeError: as `attention_decode`; k is given without cache_seqlens, rotary_cos without
            rotary_sin, or either of these without k.
    Source: flash-attn 2.8, `flash_attn_with_kvcache`.
    Example:
        >>> from fastattn.integrations.flash_attn import flash_attn_with_kvcache
        >>> k_cache, v_cache = torch.zeros(2, 2, 128, 2, 64)
        >>> q, k = torch.randn(2, 1, 8, 64), torch.randn(2, 1, 2, 64)
        >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, k, cache_seqlens=0, causal=True).shape  # the first token
        torch.Size([2, 1, 8, 64])
    """
    name = "flash_attn_with_kvcache"
    _check_layout(name, _BATCHED, q=q, k_cache=k_cache, v_cache=v_cache)
    if (k is None) != (v is None):
        raise ValueError(f"{name}: k and v must be given together, got only {'v' if k is None else 'k'}")
    if k is not None:
        _check_layout(name, _BATCHED, k=k, v=v)
        if cache_seqlens is None:
            raise ValueError(f"{name}: k and v need cache_seqlens, the position to write them at, got None")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError(f"{name}: rotary_cos and rotary_sin must be given together")
    if rotary_cos is not None and k is None:
        raise ValueError(f"{name}: rotary_cos and rotary_sin need k and v: keys in the cache are already rotated")
    if cache_seqlens is None:
        cache_seqlens = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    left, right, _ = resolve_window(name, causal, window_size)
    if isinstance(cache_seqlens, torch.Tensor):
        check_int32(name, "cache_seqlens", cache_seqlens, q, q.shape[0])
    else:
        if cache_seqlens < 0:
            raise ValueError(f"{name}: cache_seqlens must be at least 0, got {cache_seqlens}")
        cache_seqlens = torch.full((q.shape[0],), int(cache_seqlens), dtype=torch.int32, device=q.device)
    q, k_cache, v_cache = (t.transpose(1, 2) for t in (q, k_cache, v_cache))
    if k is not None:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    if rotary_cos is not None:
        end = cache_seqlens[:, None]
        positions_q, positions_k = (end + torch.arange(t.shape[2], device=q.device) for t in (q, k))
        if left == right == -1:
            positions_q = end.expand_as(positions_q)
        tables: dict[str, Any] = {"cos": rotary_cos, "sin": rotary_sin, "interleaved": rotary_interleaved}
        q = rotary_embedding(q, positions=positions_q, **tables)
        k = rotary_embedding(k, positions=positions_k, **tables)  # type: ignore[arg-type]  # checked above
    result: Any = attention_decode(  # type: ignore[call-overload, misc]  # a bool decides which
        q, k_cache, v_cache, k=k, v=v, cache_seqlens=cache_seqlens, block_table=block_table,
        cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad, causal=causal, window=window_size,
        softcap=softcap, alibi_slopes=alibi_slopes, scale=softmax_scale, num_splits=num_splits,
        return_lse=return_softmax_lse,
    )  # fmt: skip
    return (result[0].transpose(1, 2), result[1]) if return_softmax_lse else result.transpose(1, 2)
