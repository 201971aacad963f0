"""Rotary position embedding of one tensor, or of q and k in one launch.

    y1 = x1 * cos - x2 * sin,  y2 = x2 * cos + x1 * sin       dx1 = dy1 * cos + dy2 * sin,  dx2 = dy2 * cos - dy1 * sin

The backward is the same op with negated angles (`conjugate`), and is itself differentiable. x is not saved. Tables of
rotary_dim columns have a number for each channel: cos1 and sin1 in y1, cos2 and sin2 in y2; the backward has -sin2 and
-sin1 instead.
"""

from typing import NamedTuple, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from typing_extensions import Unpack

from fastattn import reference
from fastattn.ops._backends import choose, device_name, grad_wanted, register_backend
from fastattn.ops._dtypes import why_not_dtypes
from fastattn.ops._kinds import check_memory, is_dtensor, is_nested
from fastattn.ops._layout import empty_in_layout
from fastattn.ops._nested import Rows, sequences_of
from fastattn.ops._public import Public
from fastattn.ops._register import (
    TRACED,
    apply,
    checks_operands,
    raw_ops,
    register_autograd,
    register_fake,
    traced_backend,
)  # fmt: skip
from fastattn.ops._rotary_checks import check_inputs, check_positions, check_tables, fail
from fastattn.ops._types import Backend, RotaryOptions


class Facts(NamedTuple):
    """The properties of a call that decide which backends can serve it."""

    device: str
    dtype: torch.dtype
    table_dtype: torch.dtype = torch.float32
    table_grad: bool = False


class RotaryCall(NamedTuple):
    """The arguments of the raw op after q and k and before `conjugate`, in order."""

    cos: Tensor
    sin: Tensor
    positions: Tensor | None
    offset: int
    rotary_dim: int
    interleaved: bool


def _empty_like(x):
    return x.new_empty(x.shape) if x.dim() == 3 else empty_in_layout(x, x.shape[-1])


def _rotary_fwd_fake(q, k, *_):
    return _empty_like(q), q.new_empty(0) if k is None else _empty_like(k)


register_fake("rotary_fwd", _rotary_fwd_fake)
register_fake("rotary_fwd_", lambda *_: None)
_fwd, _fwd_ = raw_ops("rotary_fwd"), raw_ops("rotary_fwd_")


def _why_not(facts):
    _, dtype, table_dtype, table_grad = facts
    if reason := why_not_dtypes(dtype):
        return reason
    if table_dtype not in (torch.float32, dtype):
        return f"it supports cos and sin in float32 or the dtype of x, {dtype}, got {table_dtype}"
    return "it computes no gradients of cos and sin" if table_grad else None


for _backend in ("native", "triton"):
    register_backend("rotary", _backend, _why_not, facts=Facts)


def _reference(xs, cos, sin, positions, offset, rotary_dim, interleaved):
    return tuple(
        reference.rotary_embedding(
            x, cos, sin, rotary_dim=rotary_dim, offset=offset, interleaved=interleaved,
            positions=positions if positions is None or x.dim() == 4 else positions.flatten(),
        )
        for x in xs
    )  # fmt: skip


class _Rotary(torch.autograd.Function):
    # q must come first: when autograd tracks an in-place change of a view, it assumes that the first tensor changes
    @staticmethod
    def forward(ctx, q, k, backend, inplace, cos, sin, positions, offset, rotary_dim, interleaved, conjugate):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin, positions)
        ctx.options = (backend, offset, rotary_dim, interleaved, conjugate)
        if inplace:
            ctx.mark_dirty(q)
        xs = (q,) if k is None else (q, k)
        return _launch(backend, inplace, xs, cos, sin, positions, offset, rotary_dim, interleaved, conjugate)

    @staticmethod
    def backward(ctx, *grads):
        backend, offset, rotary_dim, interleaved, conjugate = ctx.options
        present = tuple(g for g in grads if g is not None)
        rest = (*ctx.saved_tensors, offset, rotary_dim, interleaved, not conjugate)
        rotated = iter(_run(backend, False, present, *rest) if present else ())
        dq, dk = [None if g is None else next(rotated) for g in (*grads, None)[:2]]
        return dq, dk, None, None, None, None, None, None, None, None, None


def _launch(backend, inplace, xs, *rest):
    k = xs[1] if len(xs) == 2 else None
    if inplace:
        _fwd_[backend](xs[0], k, *rest)
        return xs
    fwd = _fwd if is_dynamo_compiling() else _fwd.direct
    return fwd[backend](xs[0], k, *rest)[: len(xs)]


def _run(backend, inplace, xs, *rest):
    """Run the kernels, under autograd if it must record them."""
    if not grad_wanted(*xs):
        if inplace:
            torch.autograd.graph.increment_version([x for x in xs if not x.is_inference()])
        return _launch(backend, inplace, xs, *rest)
    if inplace:  # autograd allows a function to change a view only if it changes no other tensor
        return tuple(apply(_Rotary, x, None, backend, True, *rest)[0] for x in xs)
    return apply(_Rotary, xs[0], xs[1] if len(xs) == 2 else None, backend, False, *rest)


def _pair(results, q):
    """The results of the raw op; the second is (0,) for a single tensor."""
    return (*results, q.new_empty(0))[:2]


def _conjugate(sin, rotary_dim, interleaved):
    """The table of sines of the backward."""
    if sin.shape[-1] == rotary_dim:
        sin = sin.unflatten(-1, (-1, 2) if interleaved else (2, -1)).flip(-1 if interleaved else -2).flatten(-2)
    return -sin


def _raw_reference(q, k, cos, sin, positions, offset, rotary_dim, interleaved, conjugate):
    xs = (q,) if k is None else (q, k)
    sin = _conjugate(sin, rotary_dim, interleaved) if conjugate else sin
    return _pair(_reference(xs, cos, sin, positions, offset, rotary_dim, interleaved), q)


def _apply(backend, q, k, cos, sin, *rest):
    if grad_wanted(cos, sin):  # tables that needed no gradient when the call was recorded
        return _raw_reference(q, k, cos, sin, *rest)
    return _pair(apply(_Rotary, q, k, backend, False, cos, sin, *rest), q)


register_autograd("rotary_fwd", _apply, _raw_reference)


def _prepare(x, cos, sin, positions, interleaved, inplace):
    """Check the arguments and return (facts, tensors, RotaryCall)."""
    xs = tuple(x) if isinstance(x, (tuple, list)) else (x,)
    if len(xs) not in (1, 2):
        fail("x must be a tensor or a pair of tensors", f"{len(xs)} tensors")
    first = xs[0]
    batch, seqlen, head_dim = check_inputs(xs, inplace)
    rotary_dim = check_tables(first, cos, sin, batch, seqlen, head_dim, interleaved)
    positions, offset = check_positions(first, positions, cos, batch, seqlen)
    facts = ("cpu" if first.is_cpu else device_name(first.device), first.dtype, cos.dtype, grad_wanted(cos, sin))
    return facts, xs, RotaryCall(cos, sin, positions, offset, rotary_dim, bool(interleaved))


def _nested(name, function, given):
    """For Public(nested=): run as packed sequences, whose positions each start at 0."""
    for label in ("cos", "sin"):
        if is_nested(given[label]):
            raise ValueError(f"{name}: {label} must not be a nested tensor")
    x, positions = given["x"], given.get("positions")
    pair = isinstance(x, (tuple, list))
    labels = ("q", "k")[: len(x)] if pair else ("x",)
    found = sequences_of(name, dict(zip(labels, x if pair else (x,), strict=True)), *labels)
    offsets = found[0].offsets
    if given.get("inplace"):
        raise ValueError(f"{name}: inplace must be False for nested tensors")
    if isinstance(positions, torch.Tensor):
        if not is_nested(positions):
            raise ValueError(f"{name}: positions must be None, an int or nested, like {labels[0]}")
        positions = Rows(name, "positions", positions, last=0).tensor
    else:
        total = found[0].tensor.shape[0]
        starts = torch.repeat_interleave(offsets[:-1], offsets.diff(), output_size=total)
        positions = torch.arange(total, device=starts.device) - starts + (positions or 0)
    out = function(**given | {"x": tuple(t.tensor for t in found), "positions": positions})
    if not isinstance(out, tuple):
        return out
    out = tuple(t.restore(rotated) for t, rotated in zip(found, out, strict=True))
    return out if pair else out[0]


_PUBLIC = Public(
    "rotary_embedding",
    tensors="x cos sin positions",
    integers="positions",
    flags="interleaved inplace",
    takes_pair=True,
    nested=_nested,
)


@overload
def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, **options: Unpack[RotaryOptions]) -> Tensor: ...


@overload
def rotary_embedding(
    x: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor, **options: Unpack[RotaryOptions]
) -> tuple[Tensor, Tensor]: ...


@_PUBLIC.overridable
def rotary_embedding(
    x: Tensor | tuple[Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Rotary position embedding: rotate pairs of the first rotary_dim channels and copy the others.

    Computed in float32 and rounded once to the dtype of x. Autocast has no effect. If cos or sin requires grad, the
    call runs on the reference.

    Args:
        x: (batch, n_heads, seqlen, head_dim) as `attention` takes it, or packed (total, n_heads, head_dim); float32,
            bfloat16 or float16 (float64 runs on the reference); any strides, so a transposed (batch, seqlen, heads,
            head_dim) tensor or a slice of a projection needs no copy. Or a pair (q, k), which may differ in n_heads and
            takes one launch. Nested (batch, n_heads, seqlen, head_dim) tensors run packed; each sequence starts at 0.
        cos, sin: (max_seqlen, rotary_dim / 2), a row per position, float32 or the dtype of x; rotary_dim <= head_dim.
            Or a number for each channel, as Hugging Face has it: (batch or 1, seqlen, rotary_dim) or (max_seqlen,
            head_dim). This form excludes interleaved.
        positions: table row of each token. None: 0 to seqlen - 1; an int: the same plus this offset; or int32 or int64
            (seqlen,), (batch, seqlen), packed (total,). Packed sequences start at 0 only if positions do. On a GPU,
            where a check would synchronise, a position outside the tables gives NaN.
        interleaved: pairs are channels (2d, 2d + 1) instead of (d, d + rotary_dim / 2).
        inplace: overwrite x and return it. The tensors of a pair must not overlap. With gradients, they take two
            launches.
        backend: "native", "triton" or "reference" instead of the automatic choice.
    Returns: like x, in its layout (from the reference contiguous); for a pair, a tuple.
    Raises:
        ValueError: shapes, devices or positions are invalid, or the named backend cannot serve the call.
        TypeError: an argument has a wrong type or dtype.
    Source: Su et al., "RoFormer", 2021; half-split pairs as in GPT-NeoX and Hugging Face, interleaved as in GPT-J.
    Example:
        >>> q, angle = torch.randn(2, 8, 100, 64), torch.arange(100)[:, None] * 10_000 ** -torch.linspace(0, 1, 32)
        >>> fastattn.rotary_embedding(q, angle.cos(), angle.sin()).shape
        torch.Size([2, 8, 100, 64])
    """
    if backend is None and not inplace:
        out = _rotate_at_once(x, cos, sin, positions, bool(interleaved))
        if out is not None:
            return out
    facts, xs, call = _prepare(x, cos, sin, positions, interleaved, inplace)
    runs = choose("rotary", facts, backend)
    if type(xs[0]) is not torch.Tensor and is_dtensor(xs[0]):
        out = tuple(_rotate_sharded(runs, x, call) for x in xs)  # each with its own sharding
        if inplace:
            out = tuple(x.copy_(rotated) for x, rotated in zip(xs, out, strict=True))
    else:
        out = _rotate(runs, xs, call, inplace)
    return tuple(out) if isinstance(x, (tuple, list)) else out[0]


def _rotate_at_once(x, cos, sin, positions, interleaved):
    """The result on the C++ kernel, with tables that have a row per position; None if it needs the general way.

    The kernel checks its operands, which takes less time than checks in Python. If it refuses, the general way says
    why, or reads the tables in another form.
    """
    pair = type(x) is tuple or type(x) is list
    if pair and len(x) != 2:
        return None
    q, k = x if pair else (x, None)
    if pair and k is None:
        return None
    offset = 0
    if type(positions) is int:
        positions, offset = None, positions
    if not checks_operands("native", q, k, cos, sin, positions) or cos.dim() != 2 or grad_wanted(cos, sin):
        return None
    if traced_backend(choose("rotary", ("cpu", q.dtype, cos.dtype, False))) != "native":
        return None
    rest = (cos, sin, positions, offset, 2 * cos.shape[1], interleaved, False)
    try:
        if grad_wanted(q, k):
            out = apply(_Rotary, q, k, "native", False, *rest)
        else:
            out = _fwd.direct["native"](q, k, *rest)
    except RuntimeError:
        return None
    return out if pair else out[0]


def rotate_tokens(
    xs: tuple[Tensor, ...], cos: Tensor, sin: Tensor, rotary_dim: int, *, interleaved: bool
) -> tuple[Tensor, ...] | None:
    """Rotate one tensor or a pair by tables with a row for each token, for callers that have checked all arguments.

    Args:
        xs: (batch, n_heads, seqlen, head_dim) or packed.
        cos, sin: (seqlen, columns) or (batch or 1, seqlen, columns), without gradients. There are rotary_dim / 2
            columns, or rotary_dim: a number for each channel.
    Returns: a tuple, or None if the device has no kernel.
    """
    first = xs[0]
    runs = choose("rotary", ("cpu" if first.is_cpu else device_name(first.device), first.dtype, cos.dtype, False))
    if runs == "reference" and not first.is_cpu:
        return None
    return tuple(_rotate(runs, xs, RotaryCall(cos, sin, None, 0, rotary_dim, interleaved), False))


def _rotate(runs, xs, call, inplace):
    runs = traced_backend(runs)
    by_reference, traced = runs == "reference", runs in TRACED
    # If the kernels cannot write in place, the result is copied back; torch.compile removes that copy if possible.
    # Dispatch modes that track writes understand the copy, but not an in-place operator that may get None.
    copies = inplace and (
        by_reference
        or traced
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(t.stride(-1) != 1 for t in xs)
    )
    if by_reference:
        cos, sin, positions, *_ = call
        check_memory("rotary_embedding", x=xs[0], k=xs[-1], cos=cos, sin=sin, positions=positions)
        out = _reference(xs, *call)
    elif traced:
        out = _launch(runs, False, xs, *call, False)
    else:
        out = _run(runs, inplace and not copies, xs, *call, False)
    if copies:
        out = tuple(t.copy_(rotated) for t, rotated in zip(xs, out, strict=True))
    return out


def _rotate_sharded(runs, x, call):
    from fastattn.ops._sharded import ShardedCall

    cos, sin, positions, offset, *_ = call

    dims = "bhsd" if x.dim() == 4 else "shd"
    if positions is None and cos.dim() == 2:  # a row per token, so that a shard of the sequence gets its own rows
        cos, sin = (t[offset : offset + x.shape[dims.index("s")]] for t in (cos, sin))
        offset = 0
    table = "bsc" if cos.dim() == 3 else "sc" if positions is None else "rc"
    operands = {
        "x": (x, dims), "cos": (cos, table), "sin": (sin, table),
        "positions": (positions, "s" if positions is not None and positions.dim() == 1 else "bs"),
    }  # fmt: skip
    sharded = ShardedCall("rotary_embedding", operands, "bhs", plain=("cos", "sin", "positions"))

    def function(x, cos, sin, positions):
        part = call._replace(cos=cos, sin=sin, positions=positions, offset=offset)
        return _rotate(runs, (x,), part, False)

    return sharded(function, (dims,))[0]
