"""Attention with every feature in one op; the scores are never stored.

    s    = scale * q·k;  s = softcap * tanh(s / softcap);  s = s + bias - slope * |i + off - j|;  -inf where invisible
    lse  = log(sum_j exp(s) [+ exp(sink)]),  p = exp(s - lse),  out = (p ∘ keep * dropout_scale) · v
    dp   = keep * dropout_scale ∘ (do·vᵀ),  delta = rowsum(do ∘ out) - dlse,  ds = p ∘ (dp - delta)
    dv   = (p ∘ keep * dropout_scale)ᵀ·do,  dbias = ds summed over broadcast dims,  dsink = -sum exp(sink - lse) * delta
    dsr  = ds * (1 - (s_capped / softcap)²),  dq = scale * dsr·k,  dk = scale * dsrᵀ·q

Saved for the backward: q, k, v, out, lse, (seed, offset) and the small inputs; never anything of seqlen_q × seqlen_k.
If one fp32 number is not enough, lse is saved as lse + lse_low: next to a mask of -1e9, fp32 cannot hold the logarithm
of the sum, and without it the rows of p would not sum to 1.
The raw ops take (batch, heads, seqlen, head_dim) views of any strides. Packed sequences are a batch of 1 with
cu_seqlens; i, j, off and the Philox slab then count per sequence. Causal means window_right = 0.
"""

import math
from typing import Literal, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from typing_extensions import Unpack

from fastattn import reference
from fastattn._autocast import is_autocast_enabled
from fastattn.ops._attention_call import N_TENSORS, AttentionCall, Facts, attention_call, is_plain, sharded_call
from fastattn.ops._backends import choose, grad_wanted, register_backend
from fastattn.ops._dtypes import why_not_dtypes, why_not_triton_attention
from fastattn.ops._hopper import why_not_hopper, why_not_hopper_device
from fastattn.ops._kinds import check_memory, is_dtensor
from fastattn.ops._layout import empty_in_layout
from fastattn.ops._nested import packed_attention
from fastattn.ops._public import Public
from fastattn.ops._random import draw_rng
from fastattn.ops._register import (
    TRACED,
    apply,
    checks_operands,
    differentiate,
    python_kernel,
    raw_ops,
    register_autograd,
    register_fake,
    register_reference,
    traced_backend,
)  # fmt: skip
from fastattn.ops._types import AttentionOptions, Backend, Causal, Window

N_ARGUMENTS = len(AttentionCall._fields)


def _attention_fwd_fake(q, k, v, *others):
    need_low = others[-1]
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return empty_in_layout(q, v.shape[-1]), lse, torch.empty_like(lse) if need_low else lse.new_empty(0)


def _attention_bwd_fake(do, dlse, q, k, v, out, lse, lse_low, bias, sink, *others):
    need_dbias = others[-2]
    return (
        empty_in_layout(q, q.shape[-1]),
        empty_in_layout(k, k.shape[-1]),
        empty_in_layout(v, v.shape[-1]),
        bias.new_empty(bias.shape) if need_dbias else q.new_empty(0),
        q.new_empty(0 if sink is None else sink.shape[0], dtype=torch.float32),
    )


register_fake("attention_fwd", _attention_fwd_fake)
register_fake("attention_bwd", _attention_bwd_fake)
register_fake("attention_infer", lambda q, k, v, *_: empty_in_layout(q, v.shape[-1]))
_ops = {name: raw_ops(f"attention_{name}") for name in ("fwd", "bwd", "infer")}


def _raw(direction, backend, *tensors):
    """The raw op, or its kernel if that is a Python function that can be called directly."""
    kernel = python_kernel(f"attention_{direction}", backend, *tensors) if backend == "triton" else None
    ops = _ops[direction]
    return kernel or (ops if is_dynamo_compiling() else ops.direct)[backend]


def why_not_triton(facts):
    """Why the Triton kernels cannot serve a call, or None."""
    return why_not_triton_attention(facts, facts.dtype, facts.bias_dtype)


def why_not_native(facts):
    """Why the C++ kernels cannot serve a call, or None. On CUDA there are only those for Hopper."""
    if not facts.device.startswith("cuda"):
        return why_not_dtypes(facts.dtype, facts.bias_dtype)
    return why_not_hopper(
        facts.dtype, facts.hopper_head_dim and not facts.unequal_head_dims,
        {
            "mask": facts.mask, "bias": facts.bias_dtype is not None, "ALiBi": facts.alibi, "softcap": facts.softcap,
            "sink": facts.sink, "dropout": facts.dropout,
        },
    )  # fmt: skip


def _has_backward(backend, q):
    """Whether a backend that serves the forward has a backward: native kernels for Hopper only up to head dim 128."""
    return not (backend.startswith("native") and q.is_cuda and q.shape[-1] > 128)


def _note_native(facts):
    if facts.above_128 and facts.device.startswith("cuda"):
        return "native has no backward above head dim 128: triton computes the gradients"
    return None


register_backend(
    "attention", "native", why_not_native, facts=Facts, why_not_device=why_not_hopper_device, note=_note_native
)
register_backend("attention", "triton", why_not_triton, facts=Facts)


def _reference(*arguments):
    """The reference with the arguments of the raw op, of which need_low is optional."""
    call, need_low = AttentionCall(*arguments[:N_ARGUMENTS]), arguments[N_ARGUMENTS:] == (True,)
    packed = call.cu_seqlens_q is not None
    q, k, v = (t[0].transpose(0, 1) for t in call[:3]) if packed else call[:3]
    out, *lse = reference.attention(
        q, k, v, mask=call.mask, bias=call.bias, causal="top_left" if call.top_left else False,
        window=(call.window_left, call.window_right), seqlens_k=call.seqlens_k, cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_k=call.cu_seqlens_k, alibi_slopes=call.alibi_slopes, softcap=call.softcap, sink=call.sink,
        dropout_p=call.dropout_p, scale=call.scale, rng=call.rng, need_low=need_low,
    )  # fmt: skip
    return (out.transpose(0, 1)[None], *(t[None] for t in lse)) if packed else (out, *lse)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, backward_backend, deterministic, need_low, *arguments):
        """arguments: the fields of an AttentionCall."""
        out, lse, lse_low = _raw("fwd", backend, *arguments[:3])(*arguments, need_low)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, lse, lse_low, *arguments[:N_TENSORS])
        ctx.options = arguments[N_TENSORS:]
        ctx.backend = backward_backend
        ctx.deterministic = deterministic
        if backend not in TRACED:
            return out, lse, None
        ctx.mark_non_differentiable(lse_low)  # only a graph that includes the backward uses it
        return out, lse, lse_low

    @staticmethod
    def backward(ctx, do, dlse, _):
        out, lse, lse_low, *tensors = ctx.saved_tensors
        q, k, v, bias, sink, *others = tuple(tensors) + ctx.options
        no_grads = (None,) * len(others)
        if torch.is_grad_enabled():  # create_graph=True
            grads = differentiate(lambda *inputs: _reference(*inputs, *others), (q, k, v, bias, sink), (do, dlse))
            return None, None, None, None, *grads, *no_grads
        need_dq, need_dk, need_dv, need_dbias, need_dsink = ctx.needs_input_grad[4:9]
        run = _raw("bwd", ctx.backend, q, k, v)
        dq, dk, dv, dbias, dsink = run(
            do, dlse, q, k, v, out, lse, lse_low, bias, sink, *others, need_dbias, ctx.deterministic
        )
        return (
            None,
            None,
            None,
            None,
            dq if need_dq else None,
            dk if need_dk else None,
            dv if need_dv else None,
            dbias if need_dbias else None,
            dsink if need_dsink else None,
            *no_grads,
        )


def _needs_low(call):
    """Whether the forward saves lse_low. In half precision, plain scores need it only from about 1e5 on. A CPU saves it
    all the same, for one number per row; the kernels for Hopper do not compute it."""
    return call.q.dtype == torch.float32 or call.q.is_cpu or call.bias is not None or call.alibi_slopes is not None


def _apply(backend, *arguments):
    call = AttentionCall(*arguments[:N_ARGUMENTS])
    backward = backend if _has_backward(backend, call.q) else "triton"
    deterministic = torch.are_deterministic_algorithms_enabled()
    return apply(_Attention, backend, backward, deterministic, _needs_low(call), *call)


def _reference_of_op(*arguments):
    if AttentionCall(*arguments[:N_ARGUMENTS]).cu_seqlens_q is not None and get_proxy_mode() is not None:  # in a graph
        raise NotImplementedError(
            "attention: packed sequences cannot be exported as PyTorch operators, because the values of cu_seqlens are"
            " shapes there; export a padded batch"
        )
    out, lse, *low = _reference(*arguments)
    return out, lse, low[0] if low else lse.new_empty(0)


def _reference_of_infer(q, k, v, window_right, top_left, scale):
    nothing = (None,) * (N_TENSORS - 3)
    return _reference(q, k, v, *nothing, q.shape[2], k.shape[2], -1, window_right, top_left, 0.0, 0.0, scale)[0]


register_autograd("attention_fwd", _apply, _reference_of_op)
register_reference("attention_infer", _reference_of_infer)


_PLAIN = tuple(Facts("cpu", torch.float32))[2:]

_ATTENTION = Public(
    "attention",
    tensors="q k v mask bias seqlens_k cu_seqlens_q cu_seqlens_k alibi_slopes sink",
    numbers="softcap dropout_p scale",
    integers="max_seqlen_q max_seqlen_k",
    flags="return_lse deterministic",
    nested=packed_attention,
)


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[AttentionOptions]
) -> Tensor: ...


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[AttentionOptions]
) -> tuple[Tensor, Tensor]: ...


@_ATTENTION.overridable
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: Causal = False,
    window: Window | None = None,
    seqlens_k: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = 0.0,
    sink: Tensor | None = None,
    dropout_p: float | None = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention: softmax(scale * q·kᵀ + bias) · v, with memory linear in the sequence length.

    Query i is aligned with key i + off, where off = 0 for causal="top_left" and seqlen_k - seqlen_q otherwise
    (bottom-right). A row that sees no key gives 0, lse -inf and no gradient.

    Args:
        q: (batch, n_heads, seqlen_q, head_dim), float32, bfloat16 or float16 (float64 runs on the reference); any
            strides, so a transposed (batch, seqlen, heads, head_dim) tensor needs no copy.
        k: (batch, n_kv_heads, seqlen_k, head_dim), v: (batch, n_kv_heads, seqlen_k, head_dim_v); n_heads must be a
            multiple of n_kv_heads; query head h uses head h // (n_heads // n_kv_heads). All three may be nested, ragged
            in seqlen: they run as packed sequences, and results are nested like q.
        mask: bool, True = attend; 2 to 4 dimensions that broadcast to (batch, n_heads, seqlen_q, seqlen_k).
        bias: float, shaped like mask, added to the scaled and capped scores; gets a gradient. A CausalBias of
            torch.nn.attention.bias, passed as mask or bias, replaces causal.
        causal: False, True or "bottom_right", or "top_left": key j is visible iff j <= i + off.
        window: (left, right): keys i + off - left to i + off + right are visible; -1 = unlimited. causal sets right.
        seqlens_k: int32 (batch,): keys from this index on are invisible; it replaces seqlen_k in off.
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,): q is (total_q, n_heads, head_dim), k and v (total_k, n_kv_heads,
            ...), sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1] - 1. Excludes mask and bias. Rows after the last
            sequence give 0 and lse -inf, and get no gradient.
        max_seqlen_q, max_seqlen_k: upper bounds of the packed lengths. Optional: results do not depend on them, and
            neither time nor memory grows with the longest sequence. The native CUDA kernel chooses its block size by
            max_seqlen_k. A bound that is too small raises on a CPU; on a GPU the lengths are not read.
        alibi_slopes: float32 (n_heads,) or (batch, n_heads): slope * |i + off - j| is subtracted; gets no gradient.
        softcap: scores become softcap * tanh(score / softcap) before the bias; 0 = off.
        sink: float32 (n_heads,), an extra logit in the softmax denominator; gets a gradient.
        dropout_p: probability of setting an attention weight to 0 after the softmax; each call draws a new mask.
        scale: default 1/sqrt(head_dim).
        return_lse: also return the log-sum-exp of each row, differentiable.
        deterministic: whether gradients must be bitwise reproducible; None follows
            torch.use_deterministic_algorithms. Only the native CUDA backend is affected: by default it accumulates dq
            in arrival order.
        backend: "native", "triton" or "reference" instead of the automatic choice. On CUDA, native has no backward
            above head dim 128: Triton computes the gradients there.
    Returns: out (batch, n_heads, seqlen_q, head_dim_v) in the layout of q, packed (total_q, n_heads, head_dim_v); with
        return_lse (out, lse), lse float32 (batch, n_heads, seqlen_q), packed (n_heads, total_q).
    Raises:
        ValueError: shapes, devices, lengths or numbers are invalid, or the named backend cannot serve the call.
        TypeError: an argument has a wrong type or dtype.
    Source: Dao, "FlashAttention-2", 2023; alignment and window as in flash-attn 2.1 and later.
    Example:
        >>> q, k = torch.randn(2, 8, 100, 64), torch.randn(2, 2, 100, 64)
        >>> fastattn.attention(q, k, k, causal=True).shape
        torch.Size([2, 8, 100, 64])
    """
    is_plain_call = (
        mask is bias is window is seqlens_k is cu_seqlens_q is cu_seqlens_k is max_seqlen_q is max_seqlen_k is None
        and alibi_slopes is sink is backend is None
    )
    if is_plain_call and softcap == dropout_p == 0.0 and not return_lse:
        out = _infer_at_once(q, k, v, causal, scale)
        if out is not None:
            return out
    facts, call = attention_call(
        "attention", q, k, v, mask, bias, causal, window, seqlens_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, alibi_slopes, softcap, sink, dropout_p, scale,
    )  # fmt: skip
    out, lse = run(facts, call, backend, return_lse, deterministic)
    if cu_seqlens_q is not None:
        out, lse = out[0].transpose(0, 1), lse[0]
    return (out, lse) if return_lse else out


def _infer_at_once(q, k, v, causal, scale):
    """The output of a call with no other arguments and no gradients, on the CPU; None if it needs the general way.

    The general way checks and sorts twenty arguments, which takes longer than the attention of a few tokens. Here the
    kernel checks q, k and v, and if it refuses, the general way explains why.
    """
    if not checks_operands("native", q, k, v) or is_autocast_enabled() or grad_wanted(q, k, v):
        return None
    runs = traced_backend(choose("attention", ("cpu", q.dtype, *_PLAIN)))
    if (
        runs != "native"
        or (causal is not True and causal is not False)
        or (scale is not None and type(scale) is not float)
    ):
        return None
    try:
        if scale is None:
            scale = q.shape[3] ** -0.5
        elif not math.isfinite(scale):
            return None
        return _ops["infer"].direct[runs](q, k, v, 0 if causal else -1, False, scale)
    except (IndexError, RuntimeError, ZeroDivisionError):
        return None


@_ATTENTION.answering
def attention_with_rng(q, k, v, *, mask=None, bias=None, causal=False, dropout_p=0.0, rng=None, backend=None):
    """`attention` with return_lse and a given random state, for callers that need to redraw the dropout mask."""
    facts, call = attention_call("attention", q, k, v, mask, bias, causal, dropout_p=dropout_p)
    return run(facts, call._replace(rng=rng), backend, True)


def run(facts, call, backend=None, need_lse=False, deterministic=None):
    """(out, lse) of an AttentionCall on the backend that serves it; lse may be None unless it is needed."""
    runs = choose("attention", facts, backend)
    if type(call.q) is not torch.Tensor and is_dtensor(call.q):
        return _run_sharded(runs, facts, call, need_lse, deterministic)
    return _run_on(runs, facts, call, need_lse, deterministic)


def _run_on(runs, facts, call, need_lse, deterministic):
    q, k, v = call.q, call.k, call.v
    runs = traced_backend(runs)
    if q.is_meta and call.cu_seqlens_q is not None:
        runs = "native"  # computes only shapes; the reference would read cu_seqlens
    if call.dropout_p and call.rng is None:
        call = call._replace(rng=draw_rng(q))
    if runs == "reference":
        check_memory("attention", **dict(zip(call._fields[:N_TENSORS], call, strict=False)))
        return _reference(*call)
    if runs in TRACED:
        return _ops["fwd"][runs](*call, False)[:2]
    if grad_wanted(q, k, v, call.bias, call.sink):
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        backward = runs if _has_backward(runs, q) else choose("attention", facts, "triton")
        out, lse, _ = apply(_Attention, runs, backward, deterministic, _needs_low(call), *call)
        return out, lse
    if runs == "native" and not need_lse and q.is_cpu and call.window_left == -1 and is_plain(facts):
        infer = _raw("infer", runs)
        return infer(q, k, v, call.window_right, call.top_left, call.scale), None
    out, lse, _ = _raw("fwd", runs, q, k, v)(*call, False)
    return out, lse


def _run_sharded(runs, facts, call, need_lse, deterministic):
    positions = call.window_left >= 0 or call.window_right >= 0 or call.alibi_slopes is not None
    sharded = sharded_call("attention", call, positions)
    if call.dropout_p and call.rng is None:
        call = call._replace(rng=sharded.draw_rng())

    def function(*tensors):
        part = call._replace(**dict(zip(sharded.labels, tensors, strict=True)))
        if part.cu_seqlens_q is None:
            part = part._replace(max_seqlen_q=part.q.shape[2])
        return _run_on(runs, facts, part, need_lse, deterministic)

    return sharded(function, ("bhse", "bhs"))
