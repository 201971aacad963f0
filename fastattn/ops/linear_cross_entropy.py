"""Cross-entropy of the outputs of a linear layer, without storing the logits of all tokens.

s = x·weightᵀ + bias;  s = softcap * tanh(s / softcap);  lse = log(sum_j exp(s_j));  p = exp(s - lse)
loss = lse - (1 - label_smoothing) * s_target - label_smoothing * mean(s) + z_loss * lse²
ds = dloss * ((1 + 2 * z_loss * lse) * p - (1 - label_smoothing) * onehot(target) - label_smoothing / vocab)
ds = ds * (1 - (s / softcap)²)
dx = ds·weight,  dweight = dsᵀ·x,  dbias = sum_tokens(ds)

Tokens are processed in chunks; on a CPU, without the ignored ones. The matrix products come from _gemm.py; between
them, the raw op cross_entropy_fwd computes the losses of a chunk and overwrites its logits with ds. For the reductions
sum and mean, all tokens share one dloss, so the forward computes all gradients for dloss = 1 and the backward
multiplies them. (1 / tokens would underflow in fp16.) Without reduction, the backward processes the chunks again with
the true dloss. All chunks run inside one op, which is opaque to torch.compile.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import reference
from fastattn._autocast import as_autocast
from fastattn.ops._backends import choose, device_name, grad_wanted, register_backend
from fastattn.ops._dtypes import WeightFacts, why_not_weights
from fastattn.ops._gemm import add_weight_grad, input_grad, linear
from fastattn.ops._kinds import as_number, check_float, check_memory, is_dtensor, nonplain_kind
from fastattn.ops._loss_chunks import default_chunk_size, least_chunk
from fastattn.ops._nested import on_rows
from fastattn.ops._public import Public
from fastattn.ops._register import (
    TRACED,
    apply,
    differentiate,
    implement,
    raw_ops,
    register_autograd,
    register_fake,
    traced_backend,
)  # fmt: skip
from fastattn.ops._types import Backend, Reduction

_NAME = "linear_cross_entropy"
REDUCTIONS = ("none", "mean", "sum")


def _cross_entropy_fwd_fake(logits, target, dloss, ignore_index, label_smoothing, z_loss, softcap, need_grad):
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def _linear_cross_entropy_fwd_fake(x, weight, *others):
    need_dx, need_dweight, need_dbias = others[-3:]
    return (
        x.new_empty(x.shape[0], dtype=torch.float32),
        x.new_empty(x.shape if need_dx else (0,)),
        x.new_empty(weight.shape if need_dweight else (0,), dtype=torch.float32),
        x.new_empty(weight.shape[0] if need_dbias else 0, dtype=torch.float32),
    )


register_fake("cross_entropy_fwd", _cross_entropy_fwd_fake)
register_fake("linear_cross_entropy_fwd", _linear_cross_entropy_fwd_fake)
_fwd = raw_ops("linear_cross_entropy_fwd")


def _implementation(backend):
    cross_entropy_fwd = getattr(torch.ops.fastattn.cross_entropy_fwd, backend)

    @torch.no_grad()  # a graph that contains the op may run in grad mode
    def function(x, weight, bias, target, dloss, *others):
        *options, chunk_size, need_dx, need_dweight, need_dbias = others
        tokens, (vocab, d_model) = x.shape[0], weight.shape
        need_grad = need_dx or need_dweight or need_dbias
        new = {"dtype": torch.float32, "device": x.device}
        loss = torch.empty(tokens, **new)
        dx = torch.empty(x.shape if need_dx else (0,), dtype=x.dtype, device=x.device)
        dweight = torch.zeros(weight.shape if need_dweight else (0,), **new)
        dbias = torch.zeros(vocab if need_dbias else 0, **new)
        least = least_chunk(x.device.type, x.dtype)
        chunks = math.ceil(tokens / (chunk_size or default_chunk_size(tokens, d_model, vocab, least)))
        for chunk in range(chunks):  # sizes differ by at most one
            rows = slice(tokens * chunk // chunks, tokens * (chunk + 1) // chunks)
            logits = linear(x[rows], weight, bias)
            part = None if dloss is None else dloss[rows]
            loss[rows] = cross_entropy_fwd(logits, target[rows], part, *options, need_grad)
            if need_dx:
                dx[rows] = input_grad(logits, weight)
            if need_dweight:
                add_weight_grad(dweight, logits, x[rows])
            if need_dbias:
                dbias += logits.sum(0, dtype=torch.float32)
            del logits  # free them before the next chunk
        return loss, dx, dweight, dbias

    return _without_ignored(function)


def _without_ignored(function):
    """On a CPU, leave out the ignored tokens; a GPU would have to synchronise to count them."""

    @torch.no_grad()
    def checked(x, weight, bias, target, dloss, ignore_index, *options):
        if not x.is_cpu:
            return function(x, weight, bias, target, dloss, ignore_index, *options)
        has_ignored = _check_range(target, weight.shape[0], ignore_index)
        kept = (target != ignore_index).nonzero().flatten() if has_ignored else target
        if len(kept) == len(target):
            return function(x, weight, bias, target, dloss, ignore_index, *options)
        part = None if dloss is None else dloss[kept]
        loss, dx, *rest = function(x[kept], weight, bias, target[kept], part, ignore_index, *options)
        if dx.dim() == 2:  # otherwise the gradient of x is not needed
            dx = dx.new_zeros(x.shape).index_copy_(0, kept, dx)
        return loss.new_zeros(len(target)).index_copy_(0, kept, loss), dx, *rest

    return checked


def _check_range(target, vocab, ignore_index):
    """Raise IndexError for a target that is not a class; return whether some may be ignored."""
    check_memory(_NAME, target=target)
    if target.numel():
        low, high = (bound.item() for bound in target.aminmax())
        if low >= 0 and high < vocab:  # the usual case, in a tenth of the time
            return low <= ignore_index <= high
    bad = target[(target != ignore_index) & ((target < 0) | (target >= vocab))]
    if bad.numel():
        raise IndexError(
            f"linear_cross_entropy: target must be between 0 and {vocab - 1} or ignore_index {ignore_index},"
            f" got {bad[0].item()}"
        )
    return True


class Options(NamedTuple):
    """The options of the loss, in the order of the raw op."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float


for _backend in ("native", "triton"):
    register_backend(_NAME, _backend, why_not_weights, raw="cross_entropy_fwd", facts=WeightFacts)
    for _device in ("CPU", "CUDA"):
        implement("linear_cross_entropy_fwd", _backend, _device, _implementation(_backend))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, target, options, reduction, chunk_size, backend):
        needs = (False,) * 3 if reduction == "none" else ctx.needs_input_grad[:3]
        loss, *grads = _fwd[backend](*_flat(x, weight, bias, target), None, *options, chunk_size, *needs)
        loss, count = _reduce(loss, target, options.ignore_index, reduction)
        ctx.save_for_backward(x, weight, bias, target, count, *grads)
        ctx.options = (options, reduction, chunk_size, backend)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        x, weight, bias, target, count, *grads = ctx.saved_tensors
        options, reduction, chunk_size, backend = ctx.options
        inputs, needs = (x, weight, bias), ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph=True
            grads = differentiate(_reference(target, options, reduction), inputs, (dloss,))
        elif reduction == "none":
            dloss = dloss.reshape(-1).float().contiguous()
            _, *grads = _fwd[backend](*_flat(x, weight, bias, target), dloss, *options, chunk_size, *needs)
            grads = (g.to(t.dtype) if need else None for g, t, need in zip(grads, inputs, needs, strict=True))
        else:
            if count is not None:
                dloss = dloss / count.clamp_min(1)
            last = _is_last_backward(dloss)
            grads = (
                _scaled(g, dloss, t, last) if need else None for g, t, need in zip(grads, inputs, needs, strict=True)
            )
        dx, dweight, dbias = grads
        return None if dx is None else dx.view(x.shape), dweight, dbias, None, None, None, None, None


def _flat(x, weight, bias, target):
    check_memory(_NAME, x=x, target=target)
    return x.reshape(target.numel(), weight.shape[1]), weight, bias, target.reshape(-1).long().contiguous()


def _reduce(loss, target, ignore_index, reduction):
    """(result, number of tokens in the mean or None)."""
    if reduction == "none":
        return loss.view(target.shape), None
    if reduction == "sum":
        return loss.sum(), None
    count = (target != ignore_index).sum()
    return loss.sum() / count, count


def _is_last_backward(dloss):
    """Whether the tensors that this node saved are freed after the running backward: without retain_graph.

    False for batched gradients (is_grads_batched=True), which do not fit into the saved tensors.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._autograd._get_current_graph_task_keep_graph()
        or torch._C._functorch.is_legacy_batchedtensor(dloss)
        or torch._C._functorch.is_batchedtensor(dloss)
    )


def _scaled(grad, scale, like, last):
    """grad * scale in the dtype of `like`; in place if `last`, because grad may be as large as the weight.

    scale is an fp32 scalar tensor: the product is computed in fp32 and rounded once.
    """
    return (grad.mul_(scale) if last else grad * scale).to(like.dtype)


def _reference(target, options, reduction, **product):
    def function(x, weight, bias):
        loss = reference.linear_cross_entropy(
            x, weight, target, bias=bias, reduction=reduction, **options._asdict(), **product
        )  # fmt: skip
        return (loss,)

    return function


def _apply(backend, x, weight, bias, target, dloss, ignore_index, label_smoothing, z_loss, softcap, chunk_size, *needs):
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    loss = apply(_LinearCrossEntropy, x, weight, bias, target, options, "none", chunk_size, backend)
    return loss, *(loss.new_empty(0) for _ in needs)


def _raw_reference(x, weight, bias, target, dloss, ignore_index, label_smoothing, z_loss, softcap, chunk_size, *needs):
    if any(needs):
        return NotImplemented  # only a backward asks for gradients
    (loss,) = _reference(target, Options(ignore_index, label_smoothing, z_loss, softcap), "none")(x, weight, bias)
    return loss, x.new_empty(0), loss.new_empty(0), loss.new_empty(0)


register_autograd("linear_cross_entropy_fwd", _apply, _raw_reference)


def _check_shape(label, tensor, shape, meaning, x):
    if tensor.shape != shape:
        raise ValueError(
            f"linear_cross_entropy: {label} must have shape {tuple(shape)}, {meaning}, got {tuple(tensor.shape)}"
        )
    if tensor.device != x.device:
        raise ValueError(f"linear_cross_entropy: {label} must be on the device of x, {x.device}, got {tensor.device}")


def _check(x, weight, target, bias, label_smoothing, z_loss, softcap, reduction, chunk_size):
    """Raise unless the arguments are valid; return label_smoothing, z_loss and softcap as numbers."""
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(
            f"linear_cross_entropy: x must be a floating-point tensor with at least one dimension, got {x.dtype}"
            f" {tuple(x.shape)}"
        )
    check_float(_NAME, "x", x)
    if weight.dim() != 2:
        raise ValueError(f"linear_cross_entropy: weight must have shape (vocab, d_model), got {tuple(weight.shape)}")
    _check_shape("weight", weight, (weight.shape[0], x.shape[-1]), "(vocab, last dimension of x)", x)
    if bias is not None:
        _check_shape("bias", bias, weight.shape[:1], "the first dimension of weight", x)
    if target.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"linear_cross_entropy: target must be int64 or int32, got {target.dtype}")
    _check_shape("target", target, x.shape[:-1], "x without its last dimension", x)
    label_smoothing, z_loss, softcap = (
        as_number(_NAME, label, value)
        for label, value in (("label_smoothing", label_smoothing), ("z_loss", z_loss), ("softcap", softcap))
    )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"linear_cross_entropy: label_smoothing must be between 0 and 1, got {label_smoothing}")
    for label, value in (("z_loss", z_loss), ("softcap", softcap)):
        if not 0 <= value < math.inf:
            raise ValueError(f"linear_cross_entropy: {label} must be 0 or a positive number, got {value}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"linear_cross_entropy: chunk_size must be at least 1, got {chunk_size}")
    return float(label_smoothing), float(z_loss), float(softcap)


def _check_dtypes(x, weight, bias):
    for label, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"linear_cross_entropy: {label} must have the dtype of x, {x.dtype}, got {tensor.dtype}")


def _facts(x, nonplain=None):
    return "cpu" if x.is_cpu else device_name(x.device), x.dtype, nonplain


_PUBLIC = Public(
    _NAME, tensors="x weight target bias", weights="weight", numbers="label_smoothing z_loss softcap",
    integers="ignore_index chunk_size",
    nested=on_rows("x", "target", last=(1, 0)),
)  # fmt: skip


@_PUBLIC.overridable
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Cross-entropy of x·weightᵀ + bias and target. Memory does not grow with tokens times vocabulary.

    Args:
        x: (..., d_model), float32, bfloat16 or float16 (float64 runs on the reference), any strides. Under autocast
            x, weight and bias are cast to the autocast dtype; otherwise their dtypes must agree.
        weight: (vocab, d_model), as nn.Linear stores it. bias: (vocab,) or None. With a quantised or sparse weight the
            loss runs on the reference, which stores all logits.
        target: (...,) as in x, int64 or int32: the true class of each token, or ignore_index.
        ignore_index: tokens with this target have loss and gradient 0 and are excluded from the mean.
        label_smoothing: share of the target's probability that is spread evenly over the vocabulary.
        z_loss: adds z_loss * lse² to the loss of each token before the reduction, lse = logsumexp of its logits.
        softcap: logits become softcap * tanh(logits / softcap); 0 = off.
        reduction: "mean" over the tokens that are not ignored (NaN with gradient 0 if all are), "sum" or "none".
        chunk_size: number of tokens whose logits are stored at a time; None = chosen from the sizes, at least 256, and
            on a GPU in half precision 2048.
        backend: "native", "triton" or "reference" instead of the automatic choice.
    Returns: shape (), or that of target for reduction "none"; float32, or float64 if x is.
    Raises:
        ValueError: shapes, dtypes, devices or options are invalid, or the named backend cannot serve the call.
        TypeError: an argument has a wrong type.
        IndexError: a target is neither in the vocabulary nor ignore_index. On a GPU, where a check would synchronise,
            the loss is NaN instead.
    Source: torch.nn.functional.cross_entropy; z_loss as in Chowdhery et al., "PaLM" (2022).
    Example:
        >>> x, weight, target = torch.randn(4, 64), torch.randn(1000, 64), torch.randint(1000, (4,))
        >>> fastattn.linear_cross_entropy(x, weight, target).shape
        torch.Size([])
    """
    numbers = _check(x, weight, target, bias, label_smoothing, z_loss, softcap, reduction, chunk_size)
    options = Options(ignore_index, *numbers)
    nonplain = nonplain_kind(weight)
    if nonplain is not None:
        choose(_NAME, _facts(x, nonplain), backend)  # raises if a backend other than the reference was asked for
        return _reference(target, options, reduction, linear=F.linear)(x, weight, bias)[0]
    x, weight, bias = as_autocast(x, weight, bias)
    _check_dtypes(x, weight, bias)
    runs = choose(_NAME, _facts(x), backend)
    if type(x) is not torch.Tensor and is_dtensor(x):
        return _loss_sharded(x, weight, bias, target, options, reduction, chunk_size, runs)
    return _loss(x, weight, bias, target, options, reduction, chunk_size, runs)


def _loss(x, weight, bias, target, options, reduction, chunk_size, runs):
    runs = traced_backend(runs)
    if runs == "reference":
        check_memory(_NAME, x=x, weight=weight, bias=bias, target=target)
        return _reference(target, options, reduction)(x, weight, bias)[0]
    chunk_size = chunk_size or 0
    if runs not in TRACED and grad_wanted(x, weight, bias):
        return apply(_LinearCrossEntropy, x, weight, bias, target, options, reduction, chunk_size, runs)
    loss, *_ = _fwd[runs](*_flat(x, weight, bias, target), None, *options, chunk_size, False, False, False)
    return _reduce(loss, target, options.ignore_index, reduction)[0]


def _loss_sharded(x, weight, bias, target, options, reduction, chunk_size, runs):
    from fastattn.ops._sharded import ROWS, ShardedCall

    rows = ROWS[: x.dim() - 1]
    operands = {"x": (x, rows + "d"), "weight": (weight, "vd"), "bias": (bias, "v"), "target": (target, rows)}
    call = ShardedCall("linear_cross_entropy", operands, rows)
    of_parts = "none" if reduction == "none" else "sum"

    def function(*tensors):
        return (_loss(*tensors, options, of_parts, chunk_size, runs),)

    (loss,) = call(function, (rows if reduction == "none" else "",))
    if reduction != "mean":
        return loss
    count = (target != options.ignore_index).sum()
    return torch.where(count > 0, loss / count.clamp_min(1), float("nan"))
