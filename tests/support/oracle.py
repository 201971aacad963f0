"""The error rule of the tests: against the reference in fp64, by the error that PyTorch itself makes in that dtype."""

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
