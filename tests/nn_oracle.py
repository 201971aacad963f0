"""The drop-in layers beside torch.nn's: the same weights in both, and torch's eager slow path in fp64 as the truth."""

import contextlib
import copy

import torch

from fastattn import nn

SLACK = 16  # units in the last place beside torch's own error: both sides round at other places


@contextlib.contextmanager
def slow_path():
    """torch.nn without the fast path of inference, whose results differ (docs/torch-nn.md)."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def pair(name, *args, seed=0, **kwargs):
    """(ours, torch's), built from the same seed, all values of norms and biases random instead of 1 and 0."""
    torch.manual_seed(seed)
    ours = getattr(nn, name)(*args, **kwargs)
    theirs = getattr(torch.nn, name)(*args, **kwargs)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def results(module, call, inputs, constant=()):
    """Outputs of call(module, **inputs) and the gradients of float inputs and parameters, by name."""
    inputs = {k: v if k in constant else leaf(v) for k, v in inputs.items()}
    outputs = call(module, **inputs)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o is not None]
    named = {f"output {i}": o for i, o in enumerate(outputs)}
    leaves = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.requires_grad}
    leaves |= dict(module.named_parameters())
    generator = torch.Generator().manual_seed(1)
    scalar = sum(
        (o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)).sum() for o in outputs
    )
    grads = torch.autograd.grad(scalar, list(leaves.values()), allow_unused=True)
    named |= {f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True)}
    return named


def leaf(value):
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().clone().requires_grad_()
    return value


def compare(ours, theirs, call, inputs, autocast=False, constant=()):
    """Assert that outputs and every gradient of ours are as near to fp64 as torch's own, or nearly so."""

    def exact(value):
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    with slow_path():
        truth = results(copy.deepcopy(theirs).double(), call, {k: exact(v) for k, v in inputs.items()}, constant)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got, baseline = results(ours, call, inputs, constant), results(theirs, call, inputs, constant)
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
        eps = torch.finfo(torch.bfloat16 if autocast else value.dtype).eps
        allowed = 3 * (base.double() - expected).abs().max() + SLACK * eps * expected.abs().max().clamp(min=1)
        error = (value.double() - expected).abs().max()
        assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}, torch {base.dtype}"


def padding_mask(generator, batch, length, kind, dtype=torch.float32):
    """A mask (batch, length) that leaves key 0 visible, as bool or float; kind None gives None."""
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
