"""Matrix products: our own kernel for fp32 on processors with AVX-512, otherwise the library that torch calls.

For fp32 torch calls MKL, which uses only its AVX2 path on AMD processors, at 43 % of their peak. From 16 rows on, our
kernel is 1.5 to 2.5 times as fast as MKL and 0.93 to 1.8 times as fast as oneDNN (benchmarks/test_gemm.py). It reads
operands of any strides; oneDNN takes 2000 times as long if the second operand has gaps. It needs no setup for a new
shape, which costs oneDNN 0.7 ms. Without AVX-512, MKL is as fast. Where MKL takes its AVX-512 path, it is faster than
ours for part of the shapes: `_products_table.py` says which. Products dy · weight of one row stay with MKL,
which is twice as fast there, because our kernel would pack the whole matrix.

x · weightᵀ with few rows has kernels of its own, which read the weight in place: fp32, also times weights of 16 or 8
bits (layer.py), and bf16 on processors with AVX512-BF16. `_few_rows_table.py` says up to how many rows they serve.

In bf16 oneDNN uses AMX, and adds a bias in a pass of its own, which takes up to a third of the time. A layer in one
call therefore has products of our own with the tiles of AMX for y and dw of many rows.

On a processor without half-precision instructions, torch's loops take 2 to 120 times as long as a product in fp32 with
its conversions; dy · weight is the slowest. Large products are therefore computed in fp32 and rounded once.
"""

import ctypes
import functools
import os

import torch
import torch.nn.functional as F

from fastattn._autocast import shielded
from fastattn.ops._few_rows_table import LEAST_WEIGHT_BF16, MOST_ROWS, MOST_ROWS_BF16
from fastattn.ops._products_table import OURS_UP_TO
from fastattn.ops._register import register_fake, traced_backend


def _gemm_fake(a, b, bias, transpose_a, transpose_b):
    return a.new_empty(a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1])


register_fake("gemm", _gemm_fake)
register_fake("gemm_add_", lambda *_: None)
register_fake("gemv", lambda x, weight, scale, bias: x.new_empty(x.shape[0], weight.shape[0]))
_product = torch.ops.fastattn.gemm.native
_few_rows = torch.ops.fastattn.gemv.native
_add_product = torch.ops.fastattn.gemm_add_.native
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _slow_halves():
    """The half-precision dtypes for which no library has a fast product on this processor."""
    supported = {
        dtype: getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"))
    }
    return frozenset(dtype for dtype, check in supported.items() if check is not None and not check())


_SLOW_HALVES = _slow_halves()


def has_products(dtype):
    """Whether torch's library has a fast product of this dtype on this processor."""
    return dtype not in _SLOW_HALVES


_LARGE = 2**23  # multiplications from which converting to fp32 is worth it
_STRIP = 4096  # rows per half-precision product that is added to an fp32 sum


def _is_large(a, b, size):
    return a.is_cpu and a.numel() * b.numel() >= _LARGE * max(size, 1)


_MKL_AVX512 = (12, 14)  # of MKL's code branches (MKL_CBWR_...): AVX512 and AVX512_E1
_ANY = 2**40  # more rows than a tensor can have
_LEAST_TILED = 256  # rows; chosen by hand (docs/lab/products.md)


@functools.cache
def _mkl_uses_avx512():
    """Whether MKL takes its AVX-512 path on this processor; False where torch has no MKL that can tell."""
    library = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
    if not torch.backends.mkl.is_available() or not os.path.exists(library):
        return False
    branch = getattr(ctypes.CDLL(library), "mkl_serv_cbwr_get_auto_branch", None)
    return branch is not None and branch() in _MKL_AVX512


def key_of_fp32(capability):
    """The key of `MOST_ROWS` for an instruction set of our kernels: AMX has no products in fp32."""
    return "avx512bf16" if capability == "amx" else capability


def products_key(capability):
    """The key of `OURS_UP_TO` for an instruction set of our kernels on this processor."""
    key = key_of_fp32(capability)
    return f"{key}, MKL avx512" if _mkl_uses_avx512() else str(key)


_has_kernel = False
_up_to = dict.fromkeys(("y", "dx", "dw", "any"), _ANY)  # product → the most rows of x for which ours is used
_most_rows = 0  # the most rows of x for which a kernel for few rows computes x · weightᵀ in fp32
_most_rows_bf16 = 0  # the same in bf16
_least_tiled = _ANY  # rows from which y and dw in bf16 of a layer in one call are ours; dx is oneDNN's


def use_kernel(capability):
    """Set the instruction set of the CPU kernels, one of CPU_CAPABILITIES, or None if there are no CPU kernels."""
    global _has_kernel, _least_tiled, _most_rows, _most_rows_bf16, _up_to
    _has_kernel = capability in ("avx512", "avx512bf16", "amx")
    if _has_kernel:
        found = OURS_UP_TO.get(products_key(capability), {"y": _ANY, "dx": _ANY, "dw": _ANY})
        _up_to = found | {"any": max(found.values())}
    _most_rows = MOST_ROWS.get(key_of_fp32(capability), 0)
    # with AMX oneDNN's products are several times as fast; ours for few rows was not measured there
    _most_rows_bf16 = MOST_ROWS_BF16 if capability == "avx512bf16" else 0
    _least_tiled = _LEAST_TILED if capability == "amx" else _ANY


def few_rows():
    """The most rows for which the kernel for few rows serves products with an fp32 weight on this processor."""
    return _most_rows


def most_rows(dtype=torch.float32, rows=0):
    """(most rows of x for which the kernel for few rows computes x · weightᵀ, most rows for our other kernel).

    rows: the number of rows of x. In bf16 our other kernel is used from _LEAST_TILED rows on.
    """
    if dtype == torch.bfloat16:
        return _most_rows_bf16, _ANY if rows >= _least_tiled else 0
    return _most_rows, _up_to["y"] if _has_kernel else 0


def most_rows_of_gradients(dtype=torch.float32, rows=0):
    """The most rows of x for which our kernel computes (dy · weight, dyᵀ · x); rows: as in `most_rows`."""
    if dtype == torch.bfloat16:
        return 0, _ANY if rows >= _least_tiled else 0
    return (_up_to["dx"], _up_to["dw"]) if _has_kernel else (0, 0)


def serves_rows(rows):
    """Whether one of our kernels computes x · weightᵀ in fp32 for that many rows of x on this processor."""
    return _has_kernel or rows <= _most_rows


def is_few(x, weight):
    """Whether the kernel for few rows computes x (..., k) · weightᵀ, of dense operands."""
    return (
        x.dim() > 0
        and _fits(x, weight, x.dtype)  # first: while a program is exported, a comparison of sizes would become a guard
        and (most := most_rows(x.dtype)[0]) > 0  # if no kernel serves any rows, a tensor without rows must not pass
        and x.numel() <= most * x.shape[-1]
        and weight.dim() == 2
        and weight.stride(1) == 1
        and (x.dtype == torch.float32 or weight.numel() >= LEAST_WEIGHT_BF16)
    )


def is_ours(product, rows, a, b):
    """Whether our kernel computes a product of two matrices for that many rows of x; product: y, dx, dw or any of them.

    Tensor subclasses, functorch transforms and tracers that record a portable graph get PyTorch's product.
    """
    most = _up_to[product]
    # the comparison with a symbolic number would be a guard of torch.compile
    return _has_kernel and _fits(a, b) and (most == _ANY or rows <= most)


def _fits(a, b, dtype=torch.float32):
    return (
        a.is_cpu
        and a.dtype == b.dtype == dtype
        and (dtype == torch.float32 or dtype == torch.bfloat16)
        and type(a) in _PLAIN
        and type(b) in _PLAIN
        and not torch.compiler.is_exporting()
        and traced_backend("native") == "native"
    )


def _use_fp32(a, b, size):
    # an exported program loses the region without autocast in which the product in fp32 runs
    return (
        a.dtype in _SLOW_HALVES and a.dtype == b.dtype and _is_large(a, b, size) and not torch.compiler.is_exporting()
    )


@shielded
def linear(x, weight, bias=None):
    """x (rows, k) · weightᵀ (k, n) + bias."""
    if is_few(x, weight) and (bias is None or bias.dtype == x.dtype):
        return _few_rows(x, weight, None, None if bias is None else bias.contiguous())
    if is_ours("y", x.shape[0], x, weight) and (bias is None or bias.dtype == x.dtype):
        return _product(x, weight, bias, False, True)
    if _use_fp32(x, weight, x.shape[1]):
        return linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return F.linear(x, weight, bias)


@shielded
def input_grad(dy, weight):
    """dx = dy (rows, n) · weight (n, k)."""
    if dy.shape[0] != 1 and is_ours("dx", dy.shape[0], dy, weight):
        return _product(dy, weight, None, False, False)
    if _use_fp32(dy, weight, dy.shape[1]):
        return input_grad(dy.float(), weight.float()).to(dy.dtype)
    return dy @ weight


@shielded
def weight_grad(dy, x):
    """dweight = dyᵀ (n, rows) · x (rows, k)."""
    if is_ours("dw", dy.shape[0], dy, x):
        return _product(dy, x, None, True, False)
    if _use_fp32(dy, x, dy.shape[0]):
        return weight_grad(dy.float(), x.float()).to(dy.dtype)
    return dy.t() @ x


@shielded
def add_weight_grad(total, dy, x):
    """total (n, k), fp32, += dyᵀ (n, rows) · x (rows, k), of any dtype."""
    if is_ours("dw", dy.shape[0], dy, x) and type(total) is torch.Tensor:
        _add_product(total, dy, x, True, False)
    elif dy.dtype == total.dtype:
        total.addmm_(dy.t(), x)
    elif dy.is_cuda:
        torch.addmm(total, dy.t(), x, out_dtype=total.dtype, out=total)
    else:  # CPUs have no mixed-dtype addmm
        for strip, sums in zip(dy.split(_STRIP, 1), total.split(_STRIP), strict=True):
            sums += weight_grad(strip, x)
