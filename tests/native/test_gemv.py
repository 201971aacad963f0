"""The product of few rows against fp64: weights of three dtypes, odd sizes, every stride, any number of threads."""

import threading

import pytest
import torch
from memory_guard import at_the_end_of_memory, guarded
from oracle import FP32_EPS, assert_accurate
from processes import LOWER_CAPABILITIES, run_tests
from threads import same_bits

from fastattn._native import cpu_capability
from fastattn.ops._backends import why_not_available
from fastattn.ops.layer import convert_linear, few_rows_linear
from fastattn.ops.linear import linear

pytestmark = pytest.mark.skipif(
    why_not_available("native", "cpu") is not None, reason=f"no C++ kernels: {why_not_available('native', 'cpu')}"
)
HAS_BF16 = cpu_capability() in ("avx512bf16", "amx")
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="the processor has no AVX512-BF16")
gemv = torch.ops.fastattn.gemv.native

# (n, k): around vectors, groups of columns, chains; empty
SIZES = ((1, 1), (3, 5), (16, 8), (17, 33), (5, 64), (50, 130), (9, 4100), (65, 300), (4, 0), (0, 7))
ROWS = (0, 1, 2, 3, 4, 7, 17)
KINDS = (None, "bf16", "int8")


def matrix(tensor, layout):
    if layout == "dense":
        return at_the_end_of_memory(tensor)
    if layout == "gaps":
        return guarded(tensor, offset=3, gap=5)
    return tensor.repeat_interleave(2, 1)[:, ::2]  # x only: columns apart


def guarded_bytes(tensor, gap):
    """An int8 matrix between elements of -128, which quantised weights never are; `gap` of them follow each row."""
    rows, cols = tensor.shape
    buffer = torch.full((rows + 2, cols + gap), -128, dtype=torch.int8)
    return buffer[1:-1, :cols].copy_(tensor)


def operands(rows, n, k, kind, layout_x, layout_w):
    """(the op's arguments, the fp32 weight that they stand for)."""
    x, weight, bias = matrix(torch.randn(rows, k), layout_x), torch.randn(n, k), guarded(torch.randn(n))
    if kind is None:
        return (x, matrix(weight, layout_w), None, bias), weight
    linear = convert_linear(weight, bias, kind)
    if kind == "bf16":
        return (x, matrix(linear.weight, layout_w), None, bias), linear.weight.float()
    stored = guarded_bytes(linear.weight, 5 if layout_w == "gaps" else 0)
    return (x, stored, guarded(linear.scale), bias), linear.weight.float() * linear.scale[:, None]


@pytest.mark.parametrize("layout_w", ["dense", "gaps"])
@pytest.mark.parametrize("layout_x", ["dense", "gaps", "columns apart"])
@pytest.mark.parametrize("kind", KINDS)
def test_against_fp64(kind, layout_x, layout_w):
    for n, k in SIZES:
        for rows in ROWS:
            arguments, weight = operands(rows, n, k, kind, layout_x, layout_w)
            x, bias = arguments[0], arguments[3]
            exact = x.double() @ weight.double().t()
            baseline = x.contiguous() @ weight.t()
            bound = (x.abs() @ weight.abs().t()).max().item() if exact.numel() and k else 0.0
            slack = 4 * FP32_EPS * bound
            what = f"{rows} x {n} x {k}"
            assert_accurate(gemv(*arguments), exact + bias, baseline + bias, what=what, slack=slack)
            assert_accurate(gemv(*arguments[:3], None), exact, baseline, what=f"{what} without bias", slack=slack)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_depend_neither_on_threads_nor_on_the_other_rows(kind):
    for n, k in ((200, 800), (1000, 70), (37, 5000)):
        (x, *others), _ = operands(16, n, k, kind, "dense", "gaps")
        result = same_bits(lambda x=x, others=others: gemv(x, *others), range(1, 9))
        for rows in (slice(3, 4), slice(1, 3), slice(5, 8), slice(0, 4)):
            assert torch.equal(gemv(x[rows], *others), result[rows])


@needs_bf16
@pytest.mark.parametrize("layout_w", ["dense", "gaps"])
@pytest.mark.parametrize("layout_x", ["dense", "gaps", "columns apart"])
def test_bf16_is_rounded_once(layout_x, layout_w):
    for n, k in (*SIZES, (33, 2049), (70, 4096)):
        for rows in (*ROWS, 16, 33, 48, 130):
            x, bias = matrix(torch.randn(rows, k).bfloat16(), layout_x), guarded(torch.randn(n).bfloat16())
            weight = matrix(torch.randn(n, k).bfloat16(), layout_w)
            exact, terms = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
            for b, zero in ((bias, bias.double()), (None, torch.zeros(n, dtype=torch.float64))):
                y = gemv(x, weight, None, b)
                allowed = (exact + zero).abs() * 2**-8 + (terms + zero.abs()) * max(1, k) ** 0.5 * FP32_EPS
                assert y.dtype == torch.bfloat16
                assert ((y.double() - exact - zero).abs() <= allowed).all(), f"{rows} x {n} x {k}"


@needs_bf16
def test_bf16_bits_depend_neither_on_threads_nor_on_the_other_rows():
    x, weight, bias = torch.randn(70, 2500).bfloat16(), torch.randn(200, 2500).bfloat16(), torch.randn(200).bfloat16()
    result = same_bits(lambda: gemv(x, weight, None, bias))
    for rows in (slice(3, 4), slice(1, 20), slice(5, 40), slice(0, 50)):
        assert torch.equal(gemv(x[rows], weight, None, bias), result[rows])


@needs_bf16
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5, 3)}, "weight must be bfloat16, as x is"),
        ({"bias": torch.zeros(5)}, "bias must be contiguous bfloat16 of 5"),
        ({"x": torch.zeros(2, 4, dtype=torch.bfloat16)}, "x must be bfloat16 of two dimensions and 3 columns"),
        ({"scale": torch.zeros(5)}, "scale must be given for int8 weights"),
    ],
)
def test_bad_bf16_operands_are_named(change, message):
    x, weight = torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(5, 3, dtype=torch.bfloat16)
    arguments = {"x": x, "weight": weight, "scale": None, "bias": None} | change
    with pytest.raises(RuntimeError, match=message):
        gemv(*arguments.values())


def test_bf16_without_its_instructions_is_refused():
    if not HAS_BF16:
        x = torch.zeros(2, 3, dtype=torch.bfloat16)
        with pytest.raises(RuntimeError, match="AVX512-BF16"):
            gemv(x, x, None, None)


def test_no_rows_in_bf16_go_where_a_kernel_serves_them():
    """This holds for every instruction set, even if its kernel does not serve bf16."""
    x, weight = torch.zeros(0, 512, dtype=torch.bfloat16), torch.zeros(512, 512, dtype=torch.bfloat16)
    assert linear(x, weight).shape == (0, 512)


@needs_bf16
def test_bf16_without_columns_is_the_bias():
    """It is the first product of a thread, which has not allocated memory yet."""
    bias, found = torch.randn(17).bfloat16(), []
    x, weight = (torch.zeros(rows, 0, dtype=torch.bfloat16) for rows in (5, 17))
    thread = threading.Thread(target=lambda: found.append(gemv(x, weight, None, bias)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], bias.expand(5, -1))


@pytest.mark.parametrize("capability", LOWER_CAPABILITIES)
def test_every_instruction_set(capability):
    """If the processor lacks a set, its best one is used, which repeats the tests above."""
    run_tests("fp64 and gaps-gaps or bits or instructions or no_rows", __file__, FASTATTN_CPU_CAPABILITY=capability)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_a_converted_weight_is_as_near_as_stated(kind):
    weight = torch.randn(40, 300) * torch.logspace(-6, 6, 40)[:, None]
    weight[3] = 0
    linear = convert_linear(weight, None, kind)
    if kind == "bf16":
        assert ((linear.weight.double() - weight.double()).abs() <= weight.double().abs() / 256).all()
    else:
        restored = linear.weight.double() * linear.scale.double()[:, None]
        assert ((restored - weight.double()).abs() <= weight.double().abs().amax(1, True) / 253.9).all()
        assert linear.weight.abs().max() == 127
    x = torch.randn(2, 3, 300)
    y, exact = few_rows_linear(x, linear), x.double() @ weight.double().t()
    # errors of independent roundings add up by their squares
    size = (x.double().square().sum(-1, True) * weight.double().square().amax(1)).sqrt()
    assert ((y - exact).abs() <= 5 * size / (256 if kind == "bf16" else 254) + 1e-12).all()


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_a_nan_in_a_weight_is_a_nan_in_its_column_alone(kind):
    weight = torch.randn(6, 40)
    weight[2, 7] = float("nan")
    y = few_rows_linear(torch.randn(3, 40), convert_linear(weight, torch.randn(6), kind))
    assert y[:, 2].isnan().all()
    assert y[:, [0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_empty_weights(kind, shape):
    bias = torch.randn(shape[0])
    linear = convert_linear(torch.randn(shape), bias, kind)
    assert linear.scale.isfinite().all()
    assert torch.equal(few_rows_linear(torch.randn(2, shape[1]), linear), bias.expand(2, -1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4)}, "x must be float32 of two dimensions and 3 columns"),
        ({"x": torch.zeros(2, 3, dtype=torch.float64)}, "x must be float32"),
        ({"weight": torch.zeros(5)}, "weight must have two dimensions, got 1"),
        ({"weight": torch.zeros(3, 5).t()}, "weight must have last stride 1"),
        ({"weight": torch.zeros(5, 3, dtype=torch.float16)}, "weight must be float32, bfloat16 or int8, got Half"),
        ({"weight": torch.zeros(5, 3, dtype=torch.int8)}, "scale must be given for int8 weights"),
        ({"scale": torch.zeros(5)}, "scale must be given for int8 weights"),
        ({"bias": torch.zeros(4)}, "bias must be contiguous float32 of 5"),
    ],
)
def test_bad_operands_are_named(change, message):
    arguments = {"x": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "scale": None, "bias": None} | change
    with pytest.raises(RuntimeError, match=message):
        gemv(*arguments.values())


def test_opcheck():
    for kind in KINDS:
        arguments, _ = operands(3, 6, 7, kind, "dense", "dense")
        torch.library.opcheck(gemv, arguments)
