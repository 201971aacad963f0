"""Attention of a few new queries on a cache of keys and values. It can append to the cache in place.

    s    = scale * q·k;  s = softcap * tanh(s / softcap);  s = s - slope * |i + off - j|;  -inf where invisible
    lse  = log(sum_j exp(s) [+ exp(sink)]),  out = exp(s - lse) · v,     off = valid keys - seqlen_q

The cache is far larger than all other operands, so each byte of it is read once: the query heads that share a key head
are rows of one tile, and the keys of a sequence are divided into splits that run in parallel and are combined by lse.
Two raw ops: attention_decode_append writes new keys and values into the cache, attention_decode_fwd only reads it.
"""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from typing_extensions import Unpack

from fastattn import reference
from fastattn._autocast import autocast_dtype
from fastattn.ops._attention_checks import check_int32, check_numbers, check_per_head, resolve_window
from fastattn.ops._backends import choose, device_name, grad_wanted, register_backend
from fastattn.ops._decode_checks import NAME as _NAME
from fastattn.ops._decode_checks import check_tensors, check_values
from fastattn.ops._dtypes import why_not_dtypes, why_not_triton_attention
from fastattn.ops._hopper import HOPPER_HEAD_DIMS, why_not_hopper, why_not_hopper_device
from fastattn.ops._kinds import check_memory, is_dtensor, is_readable
from fastattn.ops._layout import empty_in_layout
from fastattn.ops._public import Public
from fastattn.ops._register import raw_ops, register_fake, register_reference, traced_backend
from fastattn.ops._types import Backend, Causal, DecodeOptions, Window

HOPPER_KEYS = 64  # keys in a block of the CUDA kernel; page sizes must be a multiple


class Facts(NamedTuple):
    """The properties of a call that decide which backends can serve it. No sizes, so that decisions can be cached."""

    device: str
    dtype: torch.dtype
    wide_heads: bool = False
    hopper_head_dim: bool = False
    unaligned_strides: bool = False
    unaligned_pages: bool = False
    leftpad: bool = False
    alibi: bool = False
    softcap: bool = False
    sink: bool = False


class DecodeCall(NamedTuple):
    """The arguments of attention_decode_fwd, plus k and v, which attention_decode_append writes first."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None
    v: Tensor | None
    cache_seqlens: Tensor
    block_table: Tensor | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    alibi_slopes: Tensor | None
    sink: Tensor | None
    seqlen_new: int
    window_left: int
    window_right: int
    softcap: float
    scale: float
    num_splits: int


def _attention_decode_fwd_fake(q, k_cache, v_cache, *_):
    return empty_in_layout(q, v_cache.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


register_fake("attention_decode_fwd", _attention_decode_fwd_fake)
register_fake("attention_decode_append", lambda *_: None)
_fwd, _append = raw_ops("attention_decode_fwd"), raw_ops("attention_decode_append")


def why_not_native(facts):
    """Why the C++ kernels cannot serve a call, or None. On CUDA there are only those for Hopper."""
    if not facts.device.startswith("cuda"):
        return why_not_dtypes(facts.dtype)
    return why_not_hopper(
        facts.dtype, facts.hopper_head_dim,
        {
            "cache strides that are not multiples of 16 bytes": facts.unaligned_strides,
            "page sizes that are not multiples of 64 keys": facts.unaligned_pages,
            "cache_leftpad": facts.leftpad, "ALiBi": facts.alibi, "softcap": facts.softcap, "sink": facts.sink,
        },
    )  # fmt: skip


register_backend(_NAME, "native", why_not_native, facts=Facts, why_not_device=why_not_hopper_device)
register_backend(_NAME, "triton", lambda facts: why_not_triton_attention(facts, facts.dtype), facts=Facts)


def _prepare(given, causal, window):
    """Check and cast the arguments; return (facts, DecodeCall). `given`: a DecodeCall without seqlen_new and window."""
    q, k_cache, v_cache, k, v, cache_seqlens, block_table, cache_batch_idx, cache_leftpad = given[:9]
    alibi_slopes, sink, num_splits = given.alibi_slopes, given.sink, given.num_splits
    device = "cpu" if q.is_cpu else device_name(q.device)
    if autocast_dtype(q) is not None:  # the caches are updated in place, so they set the dtype
        dtype = k_cache.dtype
        q, k, v = (t.to(dtype) if t is not None and t.is_floating_point() else t for t in (q, k, v))
    capacity = check_tensors(q, k_cache, v_cache, k, v, block_table, cache_batch_idx)
    batch, n_heads, _, head_dim = q.shape
    check_int32(_NAME, "cache_seqlens", cache_seqlens, q, batch)
    if cache_leftpad is not None:
        check_int32(_NAME, "cache_leftpad", cache_leftpad, q, batch)
    softcap, _, scale = check_numbers(_NAME, given.softcap, 0.0, given.scale)
    left, right, top_left = resolve_window(_NAME, causal, window)
    if top_left:
        raise ValueError(f'{_NAME}: causal must be False, True or "bottom_right", got "top_left"')
    num_splits = 0 if num_splits is None else num_splits
    if num_splits < 0:
        raise ValueError(f"{_NAME}: num_splits must be an integer of at least 0 (chosen by size), got {num_splits!r}")
    if alibi_slopes is not None:
        alibi_slopes = check_per_head(_NAME, "alibi_slopes", alibi_slopes, q, ((n_heads,), (batch, n_heads)))
    if sink is not None:
        sink = check_per_head(_NAME, "sink", sink, q, ((n_heads,),))
    seqlen_new = 0 if k is None else k.shape[2]
    if is_readable(cache_seqlens):
        check_values(k_cache, cache_seqlens, block_table, cache_batch_idx, seqlen_new, capacity)
    if scale is None:
        scale = head_dim**-0.5 if head_dim else 1.0
    wide = True if head_dim > 256 or v_cache.shape[3] > 256 else False  # noqa: SIM210  bool() would stay symbolic
    call = tuple.__new__(DecodeCall, (  # as for an AttentionCall
        q, k_cache, v_cache, k, v, cache_seqlens, block_table, cache_batch_idx, cache_leftpad, alibi_slopes, sink,
        seqlen_new, left, right, float(softcap), float(scale), num_splits,
    ))  # fmt: skip
    facts = (device, q.dtype, wide)
    if device.startswith("cuda"):  # conditional expressions, as in attention_call
        tiles = True if head_dim in HOPPER_HEAD_DIMS and v_cache.shape[3] == head_dim else False  # noqa: SIM210
        unaligned_strides = False
        for t in (k_cache, v_cache):
            # Dynamo cannot read the offset; the kernel then refuses one that is not aligned
            offset = 0 if torch.compiler.is_compiling() else t.storage_offset()
            for stride in t.stride()[:3]:
                if stride == 0 or stride % 8 or offset % 8:
                    unaligned_strides = True
        facts = Facts(
            *facts,
            hopper_head_dim=tiles,
            unaligned_strides=unaligned_strides,
            unaligned_pages=True if block_table is not None and k_cache.shape[2] % HOPPER_KEYS else False,  # noqa: SIM210
            leftpad=cache_leftpad is not None,
            alibi=alibi_slopes is not None,
            softcap=True if softcap > 0 else False,  # noqa: SIM210
            sink=sink is not None,
        )
    return facts, call


def _reference(call):
    return reference.attention_decode(
        call.q, call.k_cache, call.v_cache, k=call.k, v=call.v, cache_seqlens=call.cache_seqlens,
        block_table=call.block_table, cache_batch_idx=call.cache_batch_idx, cache_leftpad=call.cache_leftpad,
        causal=False, window=(call.window_left, call.window_right), softcap=call.softcap,
        alibi_slopes=call.alibi_slopes, sink=call.sink, scale=call.scale,
    )  # fmt: skip


def _decode_reference(q, k_cache, v_cache, *others):
    """The reference of attention_decode_fwd, which runs after attention_decode_append."""
    call = DecodeCall(q, k_cache, v_cache, None, None, *others)
    return _reference(call._replace(cache_seqlens=call.cache_seqlens + call.seqlen_new))


register_reference("attention_decode_fwd", _decode_reference)


_PUBLIC = Public(
    _NAME,
    tensors="q k_cache v_cache k v cache_seqlens block_table cache_batch_idx cache_leftpad alibi_slopes sink",
    numbers="softcap scale",
    integers="num_splits",
    flags="return_lse",
)


@overload
def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, return_lse: Literal[False] = False,
    **options: Unpack[DecodeOptions],
) -> Tensor: ...  # fmt: skip


@overload
def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, return_lse: Literal[True],
    **options: Unpack[DecodeOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@_PUBLIC.overridable
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    causal: Causal = True,
    window: Window | None = None,
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    num_splits: int | None = 0,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of a few queries on a contiguous or paged cache of keys and values; k and v are appended in place.

    Sequence b has length = cache_seqlens[b] + seqlen_new keys. Its last query is aligned with its last key: query i
    with key i + length - seqlen_q. A row that sees no key gives 0 and lse -inf.

    Args:
        q: (batch, n_heads, seqlen_q, head_dim), float32, bfloat16 or float16 (float64 runs on the reference).
        k_cache: (batch, n_kv_heads, max_seqlen, head_dim), v_cache: (batch, n_kv_heads, max_seqlen, head_dim_v), any
            strides with last stride 1, so a (batch, max_seqlen, n_kv_heads, head_dim) cache is passed as a transposed
            view. With block_table: (num_pages, n_kv_heads, page_size, ...), page_size at least 16.
        k: (batch, n_kv_heads, seqlen_new, head_dim), v: (batch, n_kv_heads, seqlen_new, head_dim_v), both or
            neither: first written into the caches after the valid keys. cache_seqlens does not change; add seqlen_new
            to it for the next call.
        cache_seqlens: int32 (batch,), valid keys before this call.
        block_table: int32 (batch, pages_per_sequence): page n of sequence b is block_table[b, n]; entries after the
            last valid key are not read.
        cache_batch_idx: int32 (batch,): row b of q uses row cache_batch_idx[b] of the caches, whose batch may then
            be larger. Rows must be distinct if k and v are given. Excludes block_table.
        cache_leftpad: int32 (batch,): keys before this index are invisible; all are if it is at least the length.
            Distances between queries and keys do not change.
        causal: True or "bottom_right": keys after the query's own position are invisible; False: all are visible.
        window: (left, right) as in `attention`; -1 = unlimited.
        softcap, alibi_slopes, sink, scale: as in `attention`.
        num_splits: number of parts into which the keys of a sequence are divided; 0 = chosen from sizes (on a GPU from
            that of the cache, because the host does not know the lengths), never from the number of threads.
        return_lse: also return the log-sum-exp of each row.
        backend: "native", "triton" or "reference" instead of the automatic choice.
    Returns: out (batch, n_heads, seqlen_q, head_dim_v) in the layout of q; with return_lse (out, lse), lse float32
        (batch, n_heads, seqlen_q).
    Raises:
        ValueError: shapes, devices, lengths or numbers are invalid, or the named backend cannot serve the call. Lengths
            and indices are checked on the CPU only, because on a GPU that would synchronise. There, keys that do not
            fit into the cache are dropped, and row and page indices must be valid.
        TypeError: an argument has a wrong type or dtype. Autocast casts q, k and v to the dtype of the caches.
        RuntimeError: an input requires grad; there is no backward.
    Source: Dao et al., "Flash-Decoding for long-context inference", 2023; cache as in flash_attn_with_kvcache.
    Example:
        >>> q, cache, lengths = torch.randn(2, 8, 1, 64), torch.randn(2, 2, 512, 64), torch.tensor([300, 7]).int()
        >>> fastattn.attention_decode(q, cache, cache, cache_seqlens=lengths).shape
        torch.Size([2, 8, 1, 64])
    """
    given = tuple.__new__(DecodeCall, (
        q, k_cache, v_cache, k, v, cache_seqlens, block_table, cache_batch_idx, cache_leftpad, alibi_slopes, sink,
        0, -1, -1, softcap, scale, num_splits,
    ))  # fmt: skip
    facts, call = _prepare(given, causal, window)
    runs = choose(_NAME, facts, backend)
    if grad_wanted(call.q, k_cache, v_cache, call.k, call.v, sink):
        raise RuntimeError(
            f"{_NAME}: there is no backward, but an input requires grad: call it under torch.no_grad() or"
            " torch.inference_mode(), or use attention"
        )
    sharded = type(call.q) is not torch.Tensor and is_dtensor(call.q)
    out, lse = (_run_sharded if sharded else _run)(runs, call)
    return (out, lse) if return_lse else out


def _run(runs, call):
    runs = traced_backend(runs)
    if runs == "reference":
        check_memory(_NAME, **{label: t for label, t in call._asdict().items() if isinstance(t, torch.Tensor)})
        return _reference(call)
    q, k_cache, v_cache, k, v, *others = call
    if k is not None:
        _append[runs](k_cache, v_cache, k, v, call.cache_seqlens, call.block_table, call.cache_batch_idx)
        if not torch.compiler.is_compiling() and not k_cache.is_inference():
            torch.autograd.graph.increment_version((k_cache, v_cache))
    fwd = _fwd if is_dynamo_compiling() else _fwd.direct
    return fwd[runs](q, k_cache, v_cache, *others)


def _run_sharded(runs, call):
    from fastattn.ops._sharded import ShardedCall

    n_heads, n_kv_heads = call.q.shape[1], call.k_cache.shape[1]
    # any sequence may use any page or row of the cache, so only a replicated cache has all that a shard needs
    row = "b" if call.block_table is None and call.cache_batch_idx is None else "p"
    letters = "bh" if call.k is None or row == "b" else "h"
    slopes = call.alibi_slopes
    dims = {
        "q": "bhsd", "k_cache": row + "htd", "v_cache": row + "hte", "k": "bhnd", "v": "bhne", "cache_seqlens": "b",
        "block_table": "bm", "cache_batch_idx": "b", "cache_leftpad": "b",
        "alibi_slopes": "h" if slopes is not None and slopes.dim() == 1 else "bh", "sink": "h",
    }  # fmt: skip
    sharded = ShardedCall(
        _NAME, {label: (getattr(call, label), dims[label]) for label in dims}, letters,
        divisible={} if n_kv_heads in (1, n_heads) else {"h": n_kv_heads},
        plain=("cache_seqlens", "block_table", "cache_batch_idx", "cache_leftpad", "alibi_slopes"),
        in_place=() if call.k is None else ("k_cache", "v_cache"),
    )  # fmt: skip

    def function(*tensors):
        return _run(runs, call._replace(**dict(zip(sharded.labels, tensors, strict=True))))

    return sharded(function, ("bhse", "bhs"))
