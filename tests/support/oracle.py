"""The error rule of the tests: against the reference in fp64, by the error that PyTorch itself makes in that dtype."""

import math

import torch

BACKWARD = 3.0  # the factor for gradients
FP32_EPS = torch.finfo(torch.float32).eps


def exact(*values):
    """The same arguments in fp64, detached. A tensor that requires grad becomes a new leaf; None stays None."""
    twins = [
        v.detach().double().requires_grad_(v.requires_grad)
        if isinstance(v, torch.Tensor) and v.is_floating_point()
        else v
        for v in values
    ]
    return twins[0] if len(twins) == 1 else twins


def assert_accurate(ours, exact, baseline, factor=2.0, what="result", slack=0.0):
    """max|ours - exact| <= factor * max|baseline - exact| + 2 * max|(exact + 0.3 - 0.3) - exact| + slack.

    The rounding term is at least one fp32 unit of the largest value.

    Args:
        ours: what is tested, in its dtype.
        exact: the same in fp64.
        baseline: the same by plain PyTorch in the dtype of ours.
        slack: for results of few numbers, where PyTorch may be exact by luck.
    """
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == baseline.dtype, f"{what}: {ours.dtype}, PyTorch gives {baseline.dtype}"
    if not ours.numel():
        return
    ours, exact, baseline = ours.detach(), exact.detach().double(), baseline.detach()
    rounded = exact.to(ours.dtype)
    rounding = ((rounded + 0.3 - 0.3).double() - rounded.double()).abs().max().item()
    rounding = max(rounding, FP32_EPS * exact.abs().max().item())
    allowed = factor * (baseline.double() - exact).abs().max().item() + 2 * rounding + slack
    error = (ours.double() - exact).abs().max().item()  # a NaN fails the comparison
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g} in {ours.dtype}"


def score_unit(lse):
    """One fp32 unit of the largest score of a call, from its lse; forward and backward may sum a score differently."""
    finite = lse[lse != -math.inf].abs()
    return FP32_EPS * (1 + finite.amax().item() if finite.numel() else 1)


def attention_slack(name, grad, by_delta, call, lse, terms):
    """By how much a gradient of attention may miss the exact one, where PyTorch's own error is smaller by chance.

    1. p = exp(s - lse), and a score is off by a few units, so p and the gradients are off by that share of themselves.
    2. ds = p (dp - delta), and delta = rowsum(do ∘ out) is computed from the rounded out. PyTorch computes it from
       p and dp, and in a row that sees one key it cancels dp - delta exactly. With few keys nothing averages.
       What this adds to a gradient, `by_delta`, is known: it is the gradient of lse in the direction of the error of
       delta. dv has none.
    3. delta is a sum of products in fp32. It reaches dbias and dsink as it is, and dq and dk times scale and the other
       operand.

    Args:
        name: "dq", "dk", "dv", "dbias" or "dsink"; grad: its exact value; by_delta: see above, or None.
        call: the AttentionCall; lse: the exact result; terms: do ∘ out, exact.
    """
    slack = 8 * score_unit(lse) * grad.abs().amax().item() if grad.numel() else 0.0
    if by_delta is None or not call.q.numel() or not call.k.numel():
        return slack
    slack += by_delta.abs().amax().item()
    if name in ("dbias", "dsink"):
        return slack + FP32_EPS * terms.square().sum().sqrt().item()
    other = (call.k if name == "dq" else call.q).double().nan_to_num(0, 0, 0).square().mean().sqrt()
    return slack + (4 * FP32_EPS * terms.sum(-1).abs().amax() * abs(call.scale) * other).item()
