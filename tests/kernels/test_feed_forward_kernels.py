"""The raw ops activation_fwd and activation_bwd against the reference in fp64.

cpu: the kernels of the CPU, or Triton's in a process with TRITON_INTERPRET=1. emulated: the sources of the CUDA kernels
and their wrappers, compiled for the CPU; used if there is no GPU. cuda-native, cuda-triton: on a GPU.
"""

import itertools
import os

import emulate_cuda
import pytest
import torch
from aot import compile_all
from feed_forward_cases import BACKEND, FLOATS, INTERPRETED, Case, keep_factor, needs_kernels
from memory_guard import guarded
from oracle import assert_accurate, exact
from processes import run_tests
from threads import same_bits
from torch.testing import assert_close

import fastattn
from fastattn import reference
from fastattn.ops.feed_forward import ACTIVATIONS

activation_fwd, activation_bwd = (
    getattr(getattr(torch.ops.fastattn, op), BACKEND) for op in ("activation_fwd", "activation_bwd")
)


ENGINES = ("cpu", "cuda-native", "cuda-triton") if torch.cuda.is_available() else ("cpu", "emulated")


class Kernels:
    """The raw ops of one engine, for tensors and results on the CPU."""

    def __init__(self, name):
        self.name, self.device, namespace, backend = name, "cpu", torch.ops.fastattn, BACKEND
        if name == "emulated":
            if reason := emulate_cuda.why_not_available():
                pytest.skip(reason)
            namespace, backend = emulate_cuda.load(), "native"
        else:
            if name != "cpu":
                self.device, _, backend = name.partition("-")
            reason = fastattn.backends()[self.device][backend]
            if reason != "available":
                pytest.skip(f"{backend} cannot run on {self.device}: {reason}")
        self._fwd, self._bwd = (getattr(getattr(namespace, op), backend) for op in ("activation_fwd", "activation_bwd"))

    def there(self, arguments):
        return (a.to(self.device) if isinstance(a, torch.Tensor) else a for a in arguments)

    def activation_fwd(self, *arguments):
        return self._fwd(*self.there(arguments)).cpu()

    def activation_bwd(self, *arguments):
        return tuple(result.cpu() for result in self._bwd(*self.there(arguments)))


@pytest.fixture(scope="module", params=ENGINES)
def kernels(request):
    return Kernels(request.param)


# both sides of the widths at which a block has more lanes, and of a strip of 256 columns; every other one not aligned
WIDTHS = ((1, 1), (3, 8), (35, 64), (9, 72), (21, 130), (70, 136), (5, 256), (3, 261), (40, 776), (2, 2056))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_passes_against_fp64(kernels, activation, gated, dtype):
    step = 5 if INTERPRETED else 2  # every width with some of the activations
    for seed, (rows, cols) in enumerate(WIDTHS[(2 * ACTIVATIONS.index(activation) + gated) % step :: step]):
        Case(max(rows, 32 // cols), cols, activation, dtype, gated, (0.0, 0.2)[seed % 2], seed).check(kernels)


def test_what_is_not_wanted_is_not_made(kernels):
    case = Case(20, 72, gated=True, dropout_p=0.1)
    full = case.run(kernels)
    for needs in ((False, False, False), (True, False, False), (False, True, False), (False, False, True)):
        results = case.run(kernels, *needs)
        wanted = (True, True, True, *needs)
        for got, want, is_wanted in zip(results, full, wanted, strict=True):
            assert torch.equal(got, want) if is_wanted else got.shape == (0,)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (4, 0)])
def test_empty(kernels, shape):
    x = torch.empty(shape)
    assert kernels.activation_fwd(x, x, None, 0.0, 0).shape == shape
    results = kernels.activation_bwd(x, x, x, None, 0.0, 0, True, True, True)
    assert [tuple(t.shape) for t in results] == [shape] * 3 + [shape[-1:]] * 2
    assert not results[3].any()
    assert not results[4].any()


def test_expanded_and_transposed_operands(kernels):
    case = Case(12, 40, gated=True, dropout_p=0.1)
    case.dhidden, case.gate = case.dhidden[:, :1].expand(12, 40), case.gate[:1].expand(12, 40)
    case.preact = case.preact.t().contiguous().t()
    got = case.run(kernels)
    case.dhidden, case.gate, case.preact = (t.contiguous() for t in (case.dhidden, case.gate, case.preact))
    for a, b in zip(got, case.run(kernels), strict=True):
        assert torch.equal(a, b)


def test_three_dimensions_and_many_rows(kernels):
    """More rows than the blocks of the grid process at once, and a sum that PyTorch itself computes in fp32."""
    case = Case(600, 16, "silu", gated=True, dropout_p=0.3)
    flat = case.check(kernels)
    for name in ("preact", "gate", "dhidden"):
        setattr(case, name, getattr(case, name).view(3, 200, 16))
    for a, b in zip(case.run(kernels), flat, strict=True):
        assert torch.equal(a.view(b.shape), b)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_activation_over_its_range(kernels, activation, dtype):
    """Value and slope on a dense grid. In fp32 the relative error is that of an exponent of up to 88."""
    x = torch.cat((torch.linspace(-16, 16, 100_003), torch.logspace(-30, 1, 5000), -torch.logspace(-30, 1, 5000)))
    x = x.to(dtype).requires_grad_()
    index = ACTIVATIONS.index(activation)
    act = reference.ACTIVATIONS[activation]
    value = kernels.activation_fwd(x.detach(), None, None, 0.0, index)
    slope, *_ = kernels.activation_bwd(torch.ones_like(x), x.detach(), None, None, 0.0, index, False, False, False)
    x64 = exact(x)
    value64, baseline = act(x64), act(x)
    assert_accurate(value, value64, baseline)
    (slope64,) = torch.autograd.grad(value64, x64, torch.ones_like(x64))
    (slope_baseline,) = torch.autograd.grad(baseline, x, torch.ones_like(x))
    assert_accurate(slope, slope64, slope_baseline, what="slope")
    if dtype == torch.float32:
        stable = {
            "gelu": lambda x: x * torch.special.erfc(-x * 0.5**0.5) / 2,
            "gelu_tanh": lambda x: x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)),
        }.get(activation, act)(x64.detach())
        relative = ((value.double() - stable).abs() / stable.abs().clamp_min(1e-30)).max().item()
        assert relative < 2e-5, f"relative error of {activation}: {relative:.3g}"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values(kernels, activation):
    index = ACTIVATIONS.index(activation)
    x = torch.tensor([0.0, -0.0, 1e30, -1e30, 3e38, 1e-40, -1e-40, 100.0, -100.0])
    value = kernels.activation_fwd(x, None, None, 0.0, index)
    assert_close(value, reference.ACTIVATIONS[activation](x.double()).float(), rtol=1e-6, atol=1e-38)
    beyond = kernels.activation_fwd(torch.tensor([float("inf"), float("nan")]), None, None, 0.0, index)
    assert beyond[0] == float("inf")
    assert beyond[1].isnan()
    x = torch.tensor([0.0, -0.0, 1e9, -1e9, 1e-40, -1e-40, 100.0, -100.0])
    slope, *_ = kernels.activation_bwd(torch.ones_like(x), x, None, None, 0.0, index, False, False, False)
    leaf = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(reference.ACTIVATIONS[activation](leaf).sum(), leaf)
    assert_close(slope.double(), expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dropout_p", [1e-6, 0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("cols", [1, 8, 13, 511, 512, 1100])
def test_dropout_masks_are_the_reference_ones(kernels, dropout_p, cols):
    rng = torch.tensor([-(2**62) + 12345, 2**33 + 7])
    ones = torch.ones(5, cols)
    expected = keep_factor(rng, dropout_p, ones.shape)
    relu = ACTIVATIONS.index("relu")
    hidden = kernels.activation_fwd(ones, None, rng, dropout_p, relu)
    dpreact, _, again, *_ = kernels.activation_bwd(ones, ones, None, rng, dropout_p, relu, True, False, False)
    for result in (hidden, dpreact, again):
        assert torch.equal(result, expected.float())


def test_dropped_infinity_is_zero(kernels):
    x = torch.full((4, 64), float("inf"))
    hidden = kernels.activation_fwd(x, None, torch.tensor([1, 2]), 0.5, ACTIVATIONS.index("relu"))
    assert set(hidden.flatten().tolist()) == {0.0, float("inf")}


@pytest.mark.parametrize("dtype", FLOATS)
def test_bias_gradient_does_not_depend_on_threads_and_repeats(dtype):
    preact, gate, dhidden = (torch.randn(500, 136).to(dtype) for _ in range(3))
    rng = torch.tensor([5, 6])
    result = same_bits(lambda: activation_bwd(dhidden, preact, gate, rng, 0.2, 0, True, True, True), (1, 2, 1, 2))
    dpreact, dgate, _, dbias, dbias_gate = result
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for sums, summed in ((dbias, dpreact), (dbias_gate, dgate)):
        assert_close(sums.double(), summed.double().sum(0), rtol=tolerance, atol=tolerance * 40)


@pytest.mark.parametrize(("cols", "offset"), [(1, 1), (15, 3), (37, 5), (64, 1)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_reads_nothing_outside_of_the_rows(kernels, dtype, cols, offset):
    """Rows with NaN between and around them, at unaligned addresses."""
    rng = torch.tensor([5, 6])
    tensors = [torch.randn(35, cols).to(dtype) for _ in range(3)]
    results = []
    for dhidden, preact, gate in (tensors, [guarded(t.to(kernels.device), offset, 3) for t in tensors]):
        results.append(
            (
                kernels.activation_fwd(preact, gate, rng, 0.2, 0),
                *kernels.activation_bwd(dhidden, preact, gate, rng, 0.2, 0, True, True, True),
            )
        )
    assert_close(results[1], results[0], rtol=0, atol=0)


@needs_kernels
def test_opcheck():
    rng = torch.tensor([1, 2])
    for shape, dtype, gated in (((5, 12), torch.float32, True), ((2, 3, 9), torch.bfloat16, False)):
        preact, gate, dhidden = (torch.randn(shape).to(dtype) for _ in range(3))
        gate = gate if gated else None
        torch.library.opcheck(activation_fwd, (preact, gate, rng, 0.1, 0))
        for needs in ((False, False, False), (True, True, True)):
            torch.library.opcheck(activation_bwd, (dhidden, preact, gate, rng, 0.1, 1, *needs))


def test_raw_ops_reject_what_does_not_fit(kernels):
    if "triton" in kernels.name:
        pytest.skip("the launchers of Triton check nothing: feed_forward does")
    x = torch.ones(2, 4)
    for bad in ((x.double(), None, None, 0.0, 0), (x, x[:1], None, 0.0, 0), (x, None, None, 0.0, 5)):
        with pytest.raises(RuntimeError, match=r"must (be|have)"):
            kernels.activation_fwd(*bad)
    with pytest.raises(RuntimeError, match="dhidden must have"):
        kernels.activation_bwd(x[:, :3], x, None, None, 0.0, 0, False, False, False)


def run_again(selected, **environment):
    """Run the selected tests of these files in a process with this environment; none may be skipped."""
    files = (__file__, "ops/test_feed_forward.py")
    assert "skipped" not in run_tests(f"({selected}) and not emulated", *files, **environment)


@needs_kernels
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_lower_instruction_sets(capability):
    kernels = "activation_over_its_range or special_values or masks or repeats or outside or random_cases and 1]"
    run_again(kernels, FASTATTN_CPU_CAPABILITY=capability)


def test_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    kernels = "masks and 0.1 or infinity or outside and float16 and (15 or 64) or not_wanted or bit_for_bit and dtype1"
    kernels += " or apart or special_values or fp64 and float16 or random_cases and [5]"
    run_again(kernels, TRITON_INTERPRET="1", FASTATTN_BACKEND="triton")


def test_triton_kernels_compile_without_spills():
    pytest.importorskip("triton", reason="triton is not installed")
    from fastattn.kernels.feed_forward import BACKWARD, FORWARD

    configs = []
    cases = (("gelu", True, True, "*bf16"), ("gelu_tanh", False, True, "*fp32"), ("silu", True, False, "*fp16"))
    kernels = (("fwd", FORWARD), ("bwd", BACKWARD))
    everything = [*itertools.product((80, 90, 100), cases, kernels)]  # by default every pair of two of the three
    for n, (arch, (activation, gated, dropped, dtype), (kernel, launch)) in enumerate(everything):
        if os.environ.get("FASTATTN_AOT") == "all" or (n // 2 + n) % 2 == 0:
            block_m, block_n, warps = launch[:3]
            absent = [] if dropped else ["rng_ptr"]
            if not gated:
                absent += ["gate_ptr"] if kernel == "fwd" else ["gate_ptr", "dgate_ptr", "dbias_gate_ptr"]
            tensors = ("preact_ptr", "gate_ptr", "hidden_ptr", "dhidden_ptr", "dpreact_ptr", "dgate_ptr")
            sizes = ("rows", "cols", "preact_stride", "gate_stride", "dhidden_stride", "threshold")
            configs.append(
                {
                    "module": "fastattn.kernels.feed_forward",
                    "kernel": f"activation_{kernel}_kernel",
                    "arch": arch,
                    "num_warps": warps,
                    "types": dict.fromkeys(tensors, dtype) | dict.fromkeys(sizes, "i32")
                    | {"rng_ptr": "*i64", "scale": "fp32", "dbias_ptr": "*fp32", "dbias_gate_ptr": "*fp32"},
                    "constants": {"ACTIVATION": activation, "BLOCK_M": block_m, "BLOCK_N": block_n}
                    | dict.fromkeys(absent),
                }
            )  # fmt: skip
    for result in compile_all(configs):
        what = {key: result[key] for key in ("kernel", "arch", "types", "constants", "registers", "stack")}
        assert result["stack"] == 0, f"spills: {what}"
        assert result["registers"] <= 128, what
        assert result["LDG.128"] >= 2, f"narrow loads: {what}"
