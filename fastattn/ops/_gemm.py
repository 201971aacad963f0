"""Matrix products by the vendor's library: torch's choice, or oneDNN where it was measured to be faster.

For fp32 torch calls MKL. On AMD processors with AVX-512 oneDNN beats it by 6 to 14 % at d_model 256 to 1024 (two cores,
1024 rows), except in `weight_grad` with more rows than columns, where oneDNN would first have to transpose the larger
operand, and except for small products: a call of it costs 13 us more. With AVX2 alone MKL is faster, by 4 to 8 % of a
training step (docs/performance-notes.md). Of a second operand with gaps oneDNN makes the product 2000 times as slowly,
and it reads a bias with gaps as if it had none.

Half precision on a processor without instructions for it: torch's own loops take 2 to 120 times as long as the product
in fp32 with its conversions, dy · weight the longest, so large ones are computed in fp32 and rounded once.
"""

import torch
import torch.nn.functional as F

from fastattn._autocast import shielded


def _is_onednn_faster(cpuinfo="/proc/cpuinfo"):
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        with open(cpuinfo, encoding="ascii", errors="replace") as file:
            first = file.read(4096)
    except OSError:
        return False
    return "AuthenticAMD" in first and "avx512f" in first


_fused = None


def set_fused(fuses):
    """Kernels that join a product of the feed-forward block with the pass after it say for which blocks they run.

    Args:
        fuses: ("fwd" or "bwd", device, dtype, d_model, d_ff) -> bool, or None: nowhere.
    """
    global _fused
    _fused = fuses


def is_fused(way, x, weight, d_model, d_ff):
    """Whether the product with `weight` of forward or backward runs in one kernel with the pass after it."""
    return _fused is not None and _fused(way, x.device, x.dtype, d_model, d_ff) and weight.numel() > 0


def _slow_halves():
    """The half-precision dtypes whose products no library makes on this processor."""
    supported = {
        dtype: getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"))
    }
    return frozenset(dtype for dtype, check in supported.items() if check is not None and not check())


_ONEDNN_IS_FASTER = _is_onednn_faster()
_SLOW_HALVES = _slow_halves()
_LARGE = 2**23  # multiplications from which oneDNN, or a detour over fp32, pays
_STRIP = 4096  # rows of a half-precision product on its way into an fp32 sum


def _is_large(a, b, size):
    return a.is_cpu and a.numel() * b.numel() >= _LARGE * max(size, 1)


def _use_onednn(a, b, size):
    """Whether the product of a and b, whose common dimension is `size`, goes to oneDNN; a may have any strides."""
    return (
        _ONEDNN_IS_FASTER
        and a.dtype == torch.float32
        and _is_large(a, b, size)
        and (b.is_contiguous() or b.t().is_contiguous())
        and not torch.compiler.is_compiling()  # inductor lowers this op for packed constant weights only
        and torch._C._get_mkldnn_enabled()
    )


def _use_fp32(a, b, size):
    return a.dtype in _SLOW_HALVES and a.dtype == b.dtype and _is_large(a, b, size)


def _onednn(x, weight, bias=None):
    return torch.ops.mkldnn._linear_pointwise(x, weight, None if bias is None else bias.contiguous(), "none", [], "")


@shielded
def linear(x, weight, bias=None):
    """x (rows, k) · weightᵀ (k, n) + bias."""
    if _use_onednn(x, weight, x.shape[1]):
        return _onednn(x, weight, bias)
    if _use_fp32(x, weight, x.shape[1]):
        return linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return F.linear(x, weight, bias)


@shielded
def input_grad(dy, weight):
    """dx = dy (rows, n) · weight (n, k)."""
    if _use_onednn(dy, weight, dy.shape[1]):
        return _onednn(dy, weight.t())
    if _use_fp32(dy, weight, dy.shape[1]):
        return input_grad(dy.float(), weight.float()).to(dy.dtype)
    return dy @ weight


@shielded
def weight_grad(dy, x):
    """dweight = dyᵀ (n, rows) · x (rows, k)."""
    if dy.shape[1] <= x.shape[1] and _use_onednn(dy, x, dy.shape[0]):
        return _onednn(dy.t(), x.t())
    if _use_fp32(dy, x, dy.shape[0]):
        return weight_grad(dy.float(), x.float()).to(dy.dtype)
    return dy.t() @ x


@shielded
def add_weight_grad(total, dy, x):
    """total (n, k), fp32, += dyᵀ (n, rows) · x (rows, k), of any dtype."""
    if dy.dtype == total.dtype:
        total.addmm_(dy.t(), x)
    elif dy.is_cuda:
        torch.addmm(total, dy.t(), x, out_dtype=total.dtype, out=total)
    else:  # no such product on a CPU
        for strip, sums in zip(dy.split(_STRIP, 1), total.split(_STRIP), strict=True):
            sums += weight_grad(strip, x)
