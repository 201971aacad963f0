"""The drop-in layers against torch.nn's: equal weights in both, and torch's eager slow path in fp64 as the truth."""

import contextlib
import copy

import torch

from fastattn import nn

SLACK = 16  # units in the last place in addition to torch's own error: both sides round at different points


@contextlib.contextmanager
def slow_path():
    """torch.nn without the fast path of inference, whose results differ (docs/torch-nn.md)."""
    before = torch.backends.mha.get_fastpath_enabled(), torch.get_num_threads()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.set_num_threads(1)  # for tensors this small, waiting for a second thread takes longer than the computation
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before[0])
        torch.set_num_threads(before[1])


def pair(name, *args, seed=0, **kwargs):
    """Return (ours, torch's), built from the same seed, with random norms and biases instead of 1 and 0."""
    torch.manual_seed(seed)
    ours = getattr(nn, name)(*args, **kwargs)
    theirs = getattr(torch.nn, name)(*args, **kwargs)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@contextlib.contextmanager
def region(kind, dtype=torch.bfloat16, device="cpu"):
    """Where code runs: "out" of autocast, "in" it, or in an "island" that disables it within such a region."""
    with torch.autocast(device, dtype, enabled=kind != "out"):
        if kind == "island":
            with torch.autocast(device, enabled=False):
                yield
        else:
            yield


def results(module, call, inputs, constant=(), forward="out", backward="out", order=1):
    """Return outputs of call(module, **inputs) and the gradients of float inputs and parameters, by name.

    Args:
        forward, backward: the kind of `region` they run in.
        order: 2 gives the gradients of the sum of the squares of the gradients.
    """
    inputs = {k: v if k in constant else leaf(v) for k, v in inputs.items()}
    with region(forward):
        outputs = call(module, **inputs)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o is not None]
    named = {f"output {i}": o for i, o in enumerate(outputs)}
    leaves = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.requires_grad}
    leaves |= dict(module.named_parameters())
    generator = torch.Generator().manual_seed(1)
    scalar = sum(
        (o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)).sum() for o in outputs
    )
    wanted = list(leaves.values())
    with region(backward):
        grads = torch.autograd.grad(scalar, wanted, allow_unused=True, create_graph=order == 2)
        if order == 2:
            penalty = sum(g.square().sum() for g in grads if g is not None)
            grads = torch.autograd.grad(penalty, wanted, materialize_grads=True)
    named |= {f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True)}
    return named


def leaf(value):
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().clone().requires_grad_()
    return value


def compare(ours, theirs, call, inputs, autocast=False, constant=(), regions=None, order=1):
    """Assert that outputs and every gradient of ours are about as near to fp64 as torch's own.

    Args:
        regions: the kinds of `region` of forward and backward; by default both "in" or "out", according to `autocast`.
        order: of the gradients, as in `results`.
    """
    forward, backward = regions or (("in", "in") if autocast else ("out", "out"))

    def exact(value):
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    with slow_path():
        exact_inputs = {k: exact(v) for k, v in inputs.items()}
        truth = results(copy.deepcopy(theirs).double(), call, exact_inputs, constant, order=order)
        got, baseline = (results(m, call, inputs, constant, forward, backward, order) for m in (ours, theirs))
    assert got.keys() == truth.keys()
    for what, expected in truth.items():
        value, base = (None if t is None else t.detach() for t in (got[what], baseline[what]))
        assert (value is None) == (base is None), f"{what}: {value}, torch {base}"
        if base is None:
            continue
        expected = expected.detach()
        assert value.shape == expected.shape, f"{what}: {tuple(value.shape)}, torch {tuple(expected.shape)}"
        assert value.dtype == base.dtype, f"{what}: {value.dtype}, torch {base.dtype}"
        if not value.numel():
            continue
        rounded = "in" in ((forward,) if what.startswith("output") else (forward, backward))
        eps = torch.finfo(torch.bfloat16 if rounded else value.dtype).eps
        allowed = 3 * (base.double() - expected).abs().max() + SLACK * eps * expected.abs().max().clamp(min=1)
        error = (value.double() - expected).abs().max()
        assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}, torch {base.dtype}"


def padding_mask(generator, batch, length, kind, dtype=torch.float32):
    """A mask (batch, length) that leaves key 0 visible, as bool or float; None for kind None."""
    if kind is None:
        return None
    mask = torch.rand(batch, length, generator=generator) < 0.4
    mask[:, 0] = False
    if kind == "bool":
        return mask
    return torch.randn(batch, length, generator=generator).masked_fill(mask, float("-inf")).to(dtype)


def score_mask(generator, shape, kind, dtype=torch.float32):
    """A mask (..., seqlen_q, seqlen_k) that leaves key 0 visible: "bool", "float", "causal" (float) or None."""
    if kind is None:
        return None
    if kind == "causal":
        return torch.full(shape[-2:], float("-inf")).triu(1).expand(shape).to(dtype)
    mask = torch.rand(shape, generator=generator) < 0.4
    mask[..., 0] = False
    if kind == "bool":
        return mask
    return torch.randn(shape, generator=generator).masked_fill(mask, float("-inf")).to(dtype)
