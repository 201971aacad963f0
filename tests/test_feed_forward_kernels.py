import itertools
import os
import subprocess
import sys

import pytest
import torch
from aot import compile_all
from memory_guard import guarded
from oracle import assert_accurate, exact
from test_feed_forward import BACKEND, FLOATS, keep_factor, needs_kernels
from torch.testing import assert_close

from fastattn import reference
from fastattn.ops.feed_forward import ACTIVATIONS

activation_fwd = getattr(torch.ops.fastattn.activation_fwd, BACKEND)
activation_bwd = getattr(torch.ops.fastattn.activation_bwd, BACKEND)
FILES = (__file__, os.path.join(os.path.dirname(__file__), "test_feed_forward.py"))


@needs_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_activation_over_its_range(activation, dtype):
    """Value and slope on a dense grid; in fp32 the relative error is that of an exponent of up to 88."""
    x = torch.cat((torch.linspace(-16, 16, 100_003), torch.logspace(-30, 1, 5000), -torch.logspace(-30, 1, 5000)))
    x = x.to(dtype).requires_grad_()
    index = ACTIVATIONS.index(activation)
    act = reference.ACTIVATIONS[activation]
    value = activation_fwd(x.detach(), None, None, 0.0, index)
    slope, *_ = activation_bwd(torch.ones_like(x), x.detach(), None, None, 0.0, index, False, False, False)
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


@needs_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values(activation):
    index = ACTIVATIONS.index(activation)
    x = torch.tensor([0.0, -0.0, 1e30, -1e30, 3e38, 1e-40, -1e-40, 100.0, -100.0])
    value = activation_fwd(x, None, None, 0.0, index)
    assert_close(value, reference.ACTIVATIONS[activation](x.double()).float(), rtol=1e-6, atol=1e-38)
    beyond = activation_fwd(torch.tensor([float("inf"), float("nan")]), None, None, 0.0, index)
    assert beyond[0] == float("inf")
    assert beyond[1].isnan()
    x = torch.tensor([0.0, -0.0, 1e9, -1e9, 1e-40, -1e-40, 100.0, -100.0])
    slope, *_ = activation_bwd(torch.ones_like(x), x, None, None, 0.0, index, False, False, False)
    leaf = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(reference.ACTIVATIONS[activation](leaf).sum(), leaf)
    assert_close(slope.double(), expected, rtol=1e-6, atol=1e-30)


@needs_kernels
@pytest.mark.parametrize("dropout_p", [1e-6, 0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("cols", [1, 8, 13, 511, 512, 1100])
def test_dropout_masks_are_the_reference_ones(dropout_p, cols):
    rng = torch.tensor([-(2**62) + 12345, 2**33 + 7])
    ones = torch.ones(5, cols)
    expected = keep_factor(rng, dropout_p, ones.shape)
    relu = ACTIVATIONS.index("relu")
    hidden = activation_fwd(ones, None, rng, dropout_p, relu)
    dpreact, _, again, *_ = activation_bwd(ones, ones, None, rng, dropout_p, relu, True, False, False)
    for result in (hidden, dpreact, again):
        assert torch.equal(result, expected.float())


@needs_kernels
def test_dropped_infinity_is_zero():
    x = torch.full((4, 64), float("inf"))
    hidden = activation_fwd(x, None, torch.tensor([1, 2]), 0.5, ACTIVATIONS.index("relu"))
    assert set(hidden.flatten().tolist()) == {0.0, float("inf")}


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS)
def test_bias_gradient_does_not_depend_on_threads_and_repeats(dtype):
    preact, gate, dhidden = (torch.randn(500, 136).to(dtype) for _ in range(3))
    rng = torch.tensor([5, 6])
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 1, 2):
            torch.set_num_threads(n)
            results.append(activation_bwd(dhidden, preact, gate, rng, 0.2, 0, True, True, True))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_close(result, results[0], rtol=0, atol=0)
    dpreact, dgate, _, dbias, dbias_gate = results[0]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for sums, summed in ((dbias, dpreact), (dbias_gate, dgate)):
        assert_close(sums.double(), summed.double().sum(0), rtol=tolerance, atol=tolerance * 40)


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS)
def test_reads_nothing_outside_of_the_rows(dtype):
    """Rows with NaN between and around them, pointers off their alignment."""
    rng = torch.tensor([5, 6])
    for cols, offset in ((1, 1), (15, 3), (37, 5), (64, 1)):
        tensors = [torch.randn(35, cols).to(dtype) for _ in range(3)]
        results = []
        for dhidden, preact, gate in (tensors, [guarded(t, offset=offset, gap=3) for t in tensors]):
            results.append(
                (
                    activation_fwd(preact, gate, rng, 0.2, 0),
                    *activation_bwd(dhidden, preact, gate, rng, 0.2, 0, True, True, True),
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


@needs_kernels
def test_raw_ops_reject_what_does_not_fit():
    x = torch.ones(2, 4)
    for bad in ((x.double(), None, None, 0.0, 0), (x, x[:1], None, 0.0, 0), (x, None, None, 0.0, 5)):
        with pytest.raises(RuntimeError, match=r"must (be|have)"):
            activation_fwd(*bad)
    with pytest.raises(RuntimeError, match="dhidden must have"):
        activation_bwd(x[:, :3], x, None, None, 0.0, 0, False, False, False)


def run_again(selected, **environment):
    """The selected tests of these files in a process with this environment, none skipped."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *FILES, "-k", selected],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert "skipped" not in result.stdout.splitlines()[-1]


@needs_kernels
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_lower_instruction_sets(capability):
    kernels = "activation_over_its_range or special_values or masks or repeats or outside or random_cases and 1]"
    run_again(kernels, FASTATTN_CPU_CAPABILITY=capability)


def test_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    kernels = "masks or infinity or outside or bit_for_bit or strided or special_values or random_cases and 5]"
    run_again(kernels, TRITON_INTERPRET="1", FASTATTN_BACKEND="triton")


def test_triton_kernels_compile_without_spills():
    pytest.importorskip("triton", reason="triton is not installed")
    from fastattn.kernels.feed_forward import BACKWARD, FORWARD

    configs = []
    cases = (("gelu", True, True, "*bf16"), ("gelu_tanh", False, True, "*fp32"), ("silu", True, False, "*fp16"))
    for arch, (activation, gated, dropped, dtype) in itertools.product((80, 90, 100), cases):
        for kernel, (block_m, block_n, warps) in (("fwd", FORWARD), ("bwd", BACKWARD)):
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
