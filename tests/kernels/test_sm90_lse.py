"""The lse of the kernels for Hopper: large scores, and a backward after the forward of another backend.

These kernels take no bias, so a mask of finite numbers never reaches them. Large scores do, through q and k or scale.
"""

import importlib
import math

import emulate_cuda
import pytest
import torch
from attention_cases import assert_close_to, results, truth_and_baseline
from hopper import DEVICE, HOPPER, use_hopper_kernels

import fastattn
from fastattn.ops.attention import _reference

attention_module = importlib.import_module("fastattn.ops.attention")  # fastattn.ops.attention is the function
TABLE = attention_module._ops


@pytest.fixture(autouse=True)
def native(monkeypatch):
    use_hopper_kernels(
        monkeypatch, emulate_cuda.ATTENTION, [(TABLE[part], f"attention_{part}") for part in ("fwd", "bwd")]
    )
    if not HOPPER:
        monkeypatch.setattr(attention_module, "_needs_low", lambda call: False)


def qkv(seqlen_q, seqlen_k, dtype, head_dim=64, constant=None):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, head_dim, generator=generator) for n in (seqlen_q, seqlen_k, seqlen_k))
    if constant is not None:
        q, k = torch.full_like(q, constant), torch.ones_like(k)
    return [t.to(dtype).to(DEVICE).requires_grad_() for t in (q, k, v)]


BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("score", "dtype"), [(1e4, FP16), (-1e4, BF16), (1e6, BF16), (-1e9, FP16), (1e30, FP16), (-1e38, BF16)]
)
def test_equal_scores_however_large(score, dtype):
    """Each row is the mean of the values it sees. Up to 1e4 the gradients are right too; beyond about 1e5, where bf16
    scores have steps of hundreds, lse without its rounding error is too coarse for them (docs/architecture.md)."""
    q, k, v = qkv(70, 200, dtype, constant=math.copysign(1.0, score))
    lengths = torch.tensor([150], dtype=torch.int32, device=DEVICE)
    options = {"seqlens_k": lengths, "scale": abs(score) / 64, "return_lse": True}
    for causal, seen in ((False, torch.full((70,), 150)), ("top_left", torch.arange(1, 71))):
        out, lse = fastattn.attention(q, k, v, causal=causal, backend="native", **options)
        sums = v.detach().cpu().double()[0].cumsum(1)
        expected = sums[:, seen - 1] / seen[:, None]
        torch.testing.assert_close(out[0].cpu().double(), expected, atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(lse[0, 0].cpu().double(), score + seen.double().log(), rtol=1e-6, atol=1e-5)
        if abs(score) <= 1e4:
            (dv,) = torch.autograd.grad(out.double().sum(), v)
            weight = torch.zeros(200, dtype=torch.float64)
            for n in seen.tolist():
                weight[:n] += 1 / n
            torch.testing.assert_close(dv[0, 0, :, 0].cpu().double(), weight, atol=2e-2, rtol=2e-2)


def forwards():
    """The raw forward of every other backend that can run here, by name."""

    def of_reference(*arguments):
        out, lse, low = _reference(*arguments[:-1], True)
        return out.detach(), lse.detach(), low[:0].flatten()

    made = {"reference": of_reference}
    for name in ("native", "triton"):
        if not (name == "native" and HOPPER) and fastattn.backends()[DEVICE][name] == "available":
            made[name] = getattr(torch.ops.fastattn.attention_fwd, name)
    return made


@pytest.mark.parametrize("name", ["reference", "native", "triton"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["one kernel", "two kernels"])
def test_backward_after_the_forward_of_another_backend(name, deterministic, monkeypatch):
    """The C++ forward for CPUs, Triton's and the reference's save what these kernels read."""
    if name not in forwards():
        pytest.skip(f"{name} cannot run here")
    sizes = (20, 40) if name == "triton" and DEVICE == "cpu" else (130, 90)
    q, k, v = qkv(*sizes, FP16)
    for options in ({"causal": True}, {"window": (30, 5), "scale": 2.0}, {"scale": 300.0}):
        kwargs = {"softcap": 0.0, "deterministic": deterministic} | options
        truth, baseline = truth_and_baseline(
            monkeypatch, *(t.cpu().detach().requires_grad_() for t in (q, k, v)), kwargs
        )
        with monkeypatch.context() as patch:
            for table in (TABLE["fwd"], TABLE["fwd"].direct):
                patch.setitem(table, "native", forwards()[name])
            got = {key: t.cpu() for key, t in results(q, k, v, kwargs, "native").items()}
        assert_close_to(got, truth, baseline, f"{name}, {options}")


@pytest.mark.skipif(HOPPER, reason="on a GPU there is no other native backward")
def test_forward_of_these_kernels_before_the_backward_for_cpus(monkeypatch):
    q, k, v = qkv(130, 90, BF16)
    kwargs = {"softcap": 0.0, "causal": True}
    truth, baseline = truth_and_baseline(monkeypatch, q, k, v, kwargs)
    with monkeypatch.context() as patch:
        for table in (TABLE["bwd"], TABLE["bwd"].direct):
            patch.setitem(table, "native", torch.ops.fastattn.attention_bwd.native)
        got = results(q, k, v, kwargs, "native")
    assert_close_to(got, truth, baseline, "native")
