"""The CPU product against fp64: odd sizes, every stride, both operands transposed, any number of threads."""

import functools
import itertools
import random

import emulate_tiles
import pytest
import torch
from memory_guard import at_the_end_of_memory, guarded
from oracle import FP32_EPS, assert_accurate
from processes import LOWER_CAPABILITIES, run_tests
from threads import same_bits

from fastattn._native import cpu_capability
from fastattn.ops._backends import why_not_available

pytestmark = pytest.mark.skipif(
    why_not_available("native", "cpu") is not None, reason=f"no C++ kernels: {why_not_available('native', 'cpu')}"
)
gemm = torch.ops.fastattn.gemm.native
gemm_add = torch.ops.fastattn.gemm_add_.native

HAS_TILES = cpu_capability() == "amx"

SIZES = (0, 1, 2, 5, 6, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100, 130)
# around the steps in which k is summed, and more rows than one task
LARGE = ((300, 200, 1100), (7, 130, 770), (1, 77, 1500), (400, 65, 385), (64, 48, 384), (65, 48, 383))
LAYOUTS = ("dense", "transposed", "gaps", "transposed gaps", "gaps in both", "expanded")


@pytest.fixture(params=["processor", "emulated"])
def gemm_of_tiles(request):
    """The product in bfloat16 by the tiles of AMX: those of the processor, and those of tests/support."""
    if request.param == "processor":
        return gemm if HAS_TILES else pytest.skip("this processor has no AMX")
    reason = emulate_tiles.why_not_available()
    return pytest.skip(reason) if reason else emulate_tiles.load().gemm.native


def matrix(rows, cols, layout, dtype=torch.float32):
    """A random matrix, followed by the end of readable memory or by NaN."""

    def random(*sizes):
        return torch.randn(sizes).to(dtype)

    if layout == "dense":
        return at_the_end_of_memory(random(rows, cols))
    if layout == "transposed":
        return at_the_end_of_memory(random(cols, rows)).t()
    if layout == "gaps":
        return guarded(random(rows, cols), gap=3)
    if layout == "transposed gaps":
        return guarded(random(cols, rows), offset=1, gap=5).t()
    if layout == "gaps in both":
        return random(2 * rows, 3 * cols)[::2, ::3]
    return guarded(random(rows, 1)).expand(rows, cols)


def operands(m, n, k, transpose_a, transpose_b, layout_a, layout_b, dtype=torch.float32):
    """(a and b as the op takes them, a as (m, k), b as (k, n))."""
    a = matrix(*((k, m) if transpose_a else (m, k)), layout_a, dtype)
    b = matrix(*((n, k) if transpose_b else (k, n)), layout_b, dtype)
    return a, b, a.t() if transpose_a else a, b.t() if transpose_b else b


def every_layout(test):
    """Parametrise a test over the layouts of both operands, transposed or not."""
    for name, values in {"transpose_b": [False, True], "transpose_a": [False, True], "layout_b": LAYOUTS,
                         "layout_a": LAYOUTS}.items():  # fmt: skip
        test = pytest.mark.parametrize(name, values)(test)
    return test


def products(layout_a, layout_b, transpose_a, transpose_b, more_sizes=(), dtype=torch.float32):
    """Yield (sizes as text, *operands) of eight products of random sizes and of a large one."""
    choose = random.Random(f"{layout_a} {layout_b} {transpose_a} {transpose_b}")
    torch.manual_seed(choose.randrange(2**32))
    sizes = [tuple(choose.choice((*SIZES, *more_sizes)) for _ in range(3)) for _ in range(8)]
    for m, n, k in [*sizes, choose.choice(LARGE)]:
        yield f"{m} x {n} x {k}", *operands(m, n, k, transpose_a, transpose_b, layout_a, layout_b, dtype)


@every_layout
def test_against_fp64(layout_a, layout_b, transpose_a, transpose_b):
    for what, a, b, left, right in products(layout_a, layout_b, transpose_a, transpose_b):
        exact, baseline = left.double() @ right.double(), left.contiguous() @ right.contiguous()
        # PyTorch sums a result with one row or column in several parts, more accurately than a single chain of k
        # additions
        bound = (left.abs() @ right.abs()).max().item() if exact.numel() else 0.0
        check = functools.partial(assert_accurate, slack=4 * FP32_EPS * bound)
        check(gemm(a, b, None, transpose_a, transpose_b), exact, baseline, what=what)
        bias = guarded(torch.randn(right.shape[1]))
        check(
            gemm(a, b, bias, transpose_a, transpose_b), exact + bias.double(), baseline + bias, what=f"{what} with bias"
        )
        out = guarded(torch.randn(exact.shape), gap=2)
        start = out.clone()
        gemm_add(out, a, b, transpose_a, transpose_b)
        check(out, start.double() + exact, start + baseline, what=f"{what} added")


@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("transpose_a", [False, True])
def test_bits_do_not_depend_on_threads_or_on_the_other_rows(transpose_a, transpose_b):
    for m, n, k in ((3, 100, 70), (64, 200, 800), (65, 200, 800), (500, 130, 400)):
        a, b, *_ = operands(m, n, k, transpose_a, transpose_b, "dense", "dense")
        result = same_bits(functools.partial(gemm, a, b, None, transpose_a, transpose_b))
        few = a[:, 1:3] if transpose_a else a[1:3]
        assert torch.equal(gemm(few, b, None, transpose_a, transpose_b), result[1:3])


@pytest.mark.parametrize("capability", LOWER_CAPABILITIES)
def test_every_instruction_set(capability):
    """If the processor lacks a set, its best one is used, which repeats the test above."""
    run_tests("fp64 and gaps-dense or bits", __file__, FASTATTN_CPU_CAPABILITY=capability)


def test_nan_and_inf_stay_in_their_row():
    a, b = torch.randn(70, 40), torch.randn(40, 90)
    a[3, 7], a[66, 0] = float("nan"), float("inf")
    result = gemm(a, b, None, False, False)
    assert result[3].isnan().all()
    assert (result[66].isinf() | result[66].isnan()).all()
    rest = [r for r in range(70) if r not in (3, 66)]
    assert result[rest].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(2, 4)}, "does not fit"),
        ({"a": torch.zeros(2)}, "two dimensions"),
        ({"a": torch.zeros(2, 3, dtype=torch.float64)}, "float32"),
        ({"bias": torch.zeros(4)}, "bias"),
    ],
)
def test_bad_operands_are_named(change, message):
    arguments = {"a": torch.zeros(2, 3), "b": torch.zeros(3, 5), "bias": None} | change
    with pytest.raises(RuntimeError, match=message):
        gemm(*arguments.values(), False, False)


def test_opcheck():
    for ways in itertools.product((False, True), repeat=2):
        a, b, *_ = operands(5, 6, 7, *ways, "dense", "dense")
        torch.library.opcheck(gemm, (a, b, torch.randn(6), *ways))
        torch.library.opcheck(gemm_add, (torch.randn(5, 6), a, b, *ways))


@every_layout
def test_bf16_is_rounded_once(gemm_of_tiles, layout_a, layout_b, transpose_a, transpose_b):
    layout = layout_a, layout_b, transpose_a, transpose_b
    for what, a, b, left, right in products(*layout, more_sizes=(32, 96), dtype=torch.bfloat16):
        k, n = right.shape
        bias = guarded(torch.randn(n).bfloat16())
        exact, terms = left.double() @ right.double(), left.double().abs() @ right.double().abs()
        for shift, zero in ((bias, bias.double()), (None, torch.zeros(n, dtype=torch.float64))):
            found = gemm_of_tiles(a, b, shift, transpose_a, transpose_b)
            allowed = (exact + zero).abs() * 2**-8 + (terms + zero.abs()) * max(1, k) ** 0.5 * FP32_EPS
            assert found.dtype == torch.bfloat16
            assert ((found.double() - exact - zero).abs() <= allowed).all(), what


@pytest.mark.parametrize(("m", "n", "k"), [(70, 200, 500), (600, 90, 2500), (96, 3000, 900), (300, 64, 12000)])
def test_bf16_bits_do_not_depend_on_threads_or_on_the_other_rows(gemm_of_tiles, m, n, k):
    """This includes operands that are packed in parts."""
    bias = torch.randn(n).bfloat16()
    for ways in itertools.product((False, True), repeat=2):
        a, b, left, _ = operands(m, n, k, *ways, "dense", "dense", torch.bfloat16)
        result = same_bits(functools.partial(gemm_of_tiles, a, b, bias, *ways))
        for rows in (slice(3, 4), slice(1, 20), slice(5, 64)):
            assert torch.equal(gemm_of_tiles(left[rows], b, bias, False, ways[1]), result[rows])


@pytest.mark.skipif(HAS_TILES, reason="this processor has AMX")
def test_bf16_without_tiles_is_refused():
    x = torch.zeros(2, 2, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="AMX"):
        gemm(x, x, None, False, False)


@pytest.mark.parametrize("n", [7, 130])
def test_a_transposed_operand_gives_the_same_bits_wherever_its_lines_lie(n):
    """Near each other, the kernel reads it in place; far apart it packs it; the last rows end at the end of memory."""
    rng = torch.Generator().manual_seed(0)
    wide, x = torch.randn(400, 2100, generator=rng), torch.randn(400, n, generator=rng)
    for first in (0, 2000):
        dy = wide[:, first : first + 100]
        near, far = dy.contiguous(), dy
        expected = (dy.double().t() @ x.double()).float()
        found = [torch.ops.fastattn.gemm.native(a, x, None, True, False) for a in (near, far)]
        assert torch.equal(*found)
        torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
