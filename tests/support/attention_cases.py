"""Seeded random calls of attention with any combination of features, and how their results are judged."""

import random

import torch
from oracle import exact

import fastattn
from fastattn import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def some(rng, *values, p):
    """Return one of the values with probability p, else None."""
    return rng.choice(values) if rng.random() < p else None


def broadcast(rng, shape):
    """Return the shape with random dimensions set to 1, sometimes without the leading ones."""
    shape = [1 if rng.random() < 0.35 else size for size in shape]
    return shape[rng.choice((0, 0, 1, 2)) :]


def random_case(seed, dtypes=DTYPES, lengths=(1, 2, 5, 17, 63, 64, 65, 100, 129), head_dims=(8, 16, 31, 40, 64, 65)):
    """Return (q, k, v, keyword arguments) of a call. Float tensors require grad, except ALiBi slopes."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    def lengths_up_to(tops):
        return torch.tensor([rng.randint(0, top) for top in tops], dtype=torch.int32)

    dtype, batch, kv_heads = rng.choice(dtypes), rng.choice((1, 2, 3)), rng.choice((1, 2))
    n_heads = kv_heads * rng.choice((1, 1, 2, 3))
    head_dim = rng.choice(head_dims)
    head_dim_v = rng.choice((head_dim, head_dim, *head_dims))
    kwargs = {
        "causal": rng.choice((False, False, True, "top_left")),
        "window": some(rng, *((a, b) for a in (-1, 0, 3, 20, 70) for b in (-1, 0, 3, 20)), p=0.3),
        "softcap": some(rng, 1.5, 5.0, p=0.25) or 0.0,
        "dropout_p": some(rng, 0.1, 0.5, p=0.3) or 0.0,
        "scale": some(rng, 0.5, 0.05, -0.2, p=0.3),
    }
    if rng.random() < 0.2:
        lens_q = [rng.choice((0, 1, 5, 64, 70)) for _ in range(batch)]
        lens_k = [rng.choice((0, 1, 9, 64, 90)) for _ in range(batch)]
        q, k, v = (
            normal(sum(lens), heads, size, dtype=dtype)
            for lens, heads, size in (
                (lens_q, n_heads, head_dim), (lens_k, kv_heads, head_dim), (lens_k, kv_heads, head_dim_v)
            )
        )  # fmt: skip
        kwargs["cu_seqlens_q"], kwargs["cu_seqlens_k"] = (
            torch.tensor([0, *lens]).cumsum(0).int() for lens in (lens_q, lens_k)
        )
        kwargs["seqlens_k"] = lengths_up_to(lens_k) if rng.random() < 0.3 else None
    else:
        seqlen_q, seqlen_k = rng.choice(lengths), rng.choice(lengths)
        q = normal(batch, n_heads, seqlen_q, head_dim, dtype=dtype)
        k, v = (normal(batch, kv_heads, seqlen_k, size, dtype=dtype) for size in (head_dim, head_dim_v))
        if rng.random() < 0.5:  # in the layout of torch.nn
            q, k, v = (t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in (q, k, v))
        full = (batch, n_heads, seqlen_q, seqlen_k)
        if rng.random() < 0.3:
            kwargs["mask"] = torch.rand(broadcast(rng, full), generator=generator) > rng.choice((0.3, 0.9))
        if rng.random() < 0.4:
            kwargs["bias"] = normal(*broadcast(rng, full), dtype=rng.choice((torch.float32, dtype)))
        kwargs["seqlens_k"] = lengths_up_to([seqlen_k] * batch) if rng.random() < 0.3 else None
    if rng.random() < 0.3:
        shape = rng.choice(((n_heads,), (batch, n_heads)))
        kwargs["alibi_slopes"] = torch.rand(shape, generator=generator) * 0.3
    if rng.random() < 0.3:
        kwargs["sink"] = normal(n_heads)
    return q, k, v, kwargs


def normal(*shape, dtype=torch.float32, seed=0, scale=1.0):
    """A leaf of normal random numbers that depend on the seed only."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).requires_grad_()


def qkv(batch, n_heads, seqlen_q, seqlen_k, head_dim, dtype=torch.float32, kv_heads=None, head_dim_v=None, scale=1.0):
    """q, k and v of a call; a large `scale` makes the scores large."""
    kv_heads = kv_heads or n_heads
    return (
        normal(batch, n_heads, seqlen_q, head_dim, dtype=dtype, seed=1, scale=scale),
        normal(batch, kv_heads, seqlen_k, head_dim, dtype=dtype, seed=2, scale=scale),
        normal(batch, kv_heads, seqlen_k, head_dim_v or head_dim, dtype=dtype, seed=3),
    )


def on(device, *values):
    """Tensors, detached, on a device. One that requires grad becomes a new leaf; other values are unchanged."""
    return [t.detach().to(device).requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t for t in values]


def results(q, k, v, kwargs, backend, seed=0, use_lse=True, call=fastattn.attention):
    """Return out, lse and all gradients for a random cotangent, by name. An lse of -inf gets no gradient.

    `call` replaces `fastattn.attention` if another entry point is tested; it takes the same arguments.
    """
    torch.manual_seed(seed)  # every call draws the same (seed, offset) for dropout
    out, lse = call(q, k, v, **kwargs, return_lse=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    loss = (out.double() * torch.randn(out.shape, generator=generator).to(out.device)).sum()
    if use_lse:
        weights = torch.randn(lse.shape, generator=generator).to(lse.device)
        loss = loss + torch.where(torch.isfinite(lse), lse.double(), 0.0).mul(weights).sum()
    leaves = {"q": q, "k": k, "v": v} | {
        name: kwargs[name] for name in ("bias", "sink") if kwargs.get(name) is not None
    }
    leaves = {name: t for name, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    named = {"out": out.detach(), "lse": lse.detach()}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        named["d" + name] = torch.zeros_like(leaf) if grad is None else grad
    return named


def truth_and_baseline(monkeypatch, q, k, v, kwargs, seed=0):
    """Return the results in fp64, and those of plain PyTorch in the dtype of q, including its softmax."""
    names = list(kwargs)
    *qkv, values = *exact(q, k, v), dict(zip(names, [exact(kwargs[name]) for name in names], strict=True))
    truth = results(*qkv, values, "reference", seed)
    baseline = results(q, k, v, kwargs, "reference", seed)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "accumulator", lambda dtype: dtype)
        low = results(q, k, v, kwargs, "reference", seed)
    return truth, low | {"lse": baseline["lse"]}


def assert_close_to(ours, truth, baseline, what):
    """The error may be twice that of PyTorch's math, three times for gradients.

    Some units in the last place of the largest value are added, in the dtype of out: delta is computed from the rounded
    out, where PyTorch's softmax may cancel exactly, and sums have another order. For lse it is 1e-5 in every dtype.
    """
    eps = torch.finfo(ours["out"].dtype).eps
    for name, expected in truth.items():
        got, base = ours[name], baseline[name]
        assert got.shape == expected.shape, f"{what} {name}: {tuple(got.shape)}, expected {tuple(expected.shape)}"
        finite = torch.isfinite(expected)
        assert torch.equal(torch.isfinite(got), finite), f"{what} {name}: finite elsewhere than expected"
        assert torch.equal(got[~finite].double(), expected[~finite].double()), f"{what} {name}: -inf elsewhere"
        if not finite.any():
            continue
        got, base, expected = (t[finite].double() for t in (got, base, expected))
        times = 2.0 if name in ("out", "lse") else 3.0
        floor = (
            1e-5
            if name == "lse"
            else (32 if ours["out"].dtype == torch.float32 else 8) * eps * expected.abs().max().clamp(min=1.0)
        )
        error, allowed = (got - expected).abs().max(), times * (base - expected).abs().max() + floor
        assert error <= allowed, f"{what} {name}: error {error:.3g}, allowed {allowed:.3g} in {ours[name].dtype}"


def check(monkeypatch, what, q, k, v, seed=0, *, backend, device="cpu", call=fastattn.attention, **kwargs):
    """Check one call of `fastattn.attention`, or its replacement, and its gradients against the truth."""
    kwargs = {"softcap": 0.0} | kwargs
    q, k, v = on(device, q, k, v)
    kwargs = dict(zip(kwargs, on(device, *kwargs.values()), strict=True))
    truth, baseline = truth_and_baseline(monkeypatch, q, k, v, kwargs, seed)
    assert_close_to(results(q, k, v, kwargs, backend, seed, call=call), truth, baseline, what)
