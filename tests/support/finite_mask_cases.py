"""Rows of a bias with finite numbers of every size, and the rule for the results of attention with them."""

import math

import torch
from attention_cases import qkv, results
from oracle import exact

SQ, SK = 66, 131  # whole tiles and parts of them; the slow interpreter gets one block of queries
LARGEST = torch.finfo(torch.float32).max


def row_kinds(seqlen_k, dtype=torch.float32):
    """(name, row of a bias) for every kind of row, with finite numbers that `dtype` can represent."""
    rows = {"0": torch.zeros(seqlen_k)}
    for value in (-1e4, -1e5, -1e6, -1e9, -1e30, -2.4e38, -LARGEST, 1e4, 1e9, 1e38, 2.4e38, LARGEST):
        rows[f"{value:g}"] = torch.full((seqlen_k,), value)
    key = torch.arange(seqlen_k)
    rows["half of it"] = torch.where(key % 2 == 0, -LARGEST, 0.0)
    rows["all but one"] = torch.where(key == 5, 0.0, -1e9)
    rows["mixture"] = torch.tensor([-1e9, -LARGEST, -1e6, -1e9, -1e4 * 3])[key % 5]
    rows["both signs"] = torch.tensor([-LARGEST, 1e38, -1e9, 1e38])[key % 4]
    rows["beside -inf"] = torch.where(key % 3 == 0, -LARGEST, -math.inf)
    rows["-inf"] = torch.full((seqlen_k,), -math.inf)
    finite = torch.finfo(dtype)
    return {
        name: torch.where(row.isinf(), row, row.clamp(finite.min, finite.max)).to(dtype) for name, row in rows.items()
    }


def bias_of_all_kinds(shape, dtype=torch.float32):
    """(..., seqlen_q, seqlen_k) whose rows cycle through the kinds."""
    kinds = torch.stack(list(row_kinds(shape[-1], dtype).values()))
    rows = torch.arange(math.prod(shape[:-1])) % len(kinds)
    return kinds[rows].view(shape).requires_grad_()


def inputs(scores, dtype=torch.float32, size=(SQ, SK), kv_heads=2):
    """q, k and v whose scores are all 0 or random."""
    q, k, v = qkv(1, 2, *size, 8, dtype, kv_heads)
    return (q.detach() * 0).requires_grad_() if scores == "zero" else q, k, v


def expected_results(q, k, v, kwargs):
    """The results of the reference, in fp64 and in the dtypes that are given."""
    twins = dict(zip(kwargs, [exact(value) for value in kwargs.values()], strict=True))
    return results(*exact(q, k, v), twins, "reference"), results(q, k, v, kwargs, "reference")


def assert_right(got, truth, baseline, what):
    """Judge each row of out, lse, dq and dbias by itself, dk and dv as a whole: twice the error of plain PyTorch, three
    times for gradients, plus some units in the last place."""
    eps = torch.finfo(got["out"].dtype).eps
    for name, expected in truth.items():
        ours, base = got[name].double(), baseline[name].double()
        finite = expected.isfinite()
        assert torch.equal(ours.isfinite(), finite), f"{what} {name}: finite elsewhere than expected"
        ours, base, expected = (torch.where(finite, t, 0.0) for t in (ours, base, expected))
        error, allowed, size = (ours - expected).abs(), (base - expected).abs(), expected.abs()
        if name in ("out", "dq", "dbias"):
            error, allowed, size = (t.amax(-1) for t in (error, allowed, size))
        elif name in ("dk", "dv"):
            error, allowed, size = (t.amax() for t in (error, allowed, size))
        units = 4e-6 if name == "lse" or eps < 1e-6 else 8 * eps
        allowed = (2 if name in ("out", "lse") else 3) * allowed + units * size.clamp(min=1.0)
        at = (error / allowed).argmax()  # NaN counts as the largest
        worst, limit = error.flatten()[at], allowed.flatten()[at]
        assert worst <= limit, f"{what} {name}: error {worst:.3g}, allowed {limit:.3g} at {at} in {got[name].dtype}"
