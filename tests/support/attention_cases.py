"""Calls of attention: a Case for the raw ops, seeded random calls of the public function, and how both are judged."""

import math
import random

import torch
from oracle import BACKWARD, assert_accurate, attention_slack, exact, score_unit

import fastattn
from fastattn import reference
from fastattn.ops._attention_call import AttentionCall
from fastattn.ops.attention import _reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIMS = ("batch", "heads", "queries", "keys")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case:
    """A call of the raw ops of attention: `call`, an AttentionCall, with `do` and `dlse`, the gradients of its results.

    Args:
        mask, bias: the names in DIMS of the dimensions along which it varies; it is broadcast along the others.
        slopes: None, "heads" (n_heads), or "batch" (batch, n_heads).
        lengths: seqlens_k; packed: (cu_seqlens_q, cu_seqlens_k).
        bshd: q, k and v are (batch, seqlen, heads, head_dim) in memory.
        numbers: the fields window_left, window_right, top_left, softcap, dropout_p and scale of the call.
    """

    def __init__(self, *, batch=1, heads=2, kv_heads=None, sq=70, sk=90, d=32, dv=None, dtype=torch.float32, mask=None,
                 bias=None, bias_dtype=None, sink=False, lengths=None, packed=None, slopes=None, bshd=False, seed=0,
                 **numbers):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(*shape, generator=generator).to(DEVICE)

        def tensor(shape):
            if bshd:
                return randn(shape[0], shape[2], shape[1], shape[3]).to(dtype).transpose(1, 2)
            return randn(*shape).to(dtype)

        def int32(values):
            return None if values is None else torch.tensor(values, dtype=torch.int32, device=DEVICE)

        ends_q, ends_k = packed or (None, None)
        sequences = batch
        if packed:
            batch, sq, sk, sequences = 1, ends_q[-1], ends_k[-1], len(ends_q) - 1
        kv_heads, dv = kv_heads or heads, dv or d

        def scores(dims):
            return randn(*[n if dim in dims else 1 for n, dim in zip((batch, heads, sq, sk), DIMS, strict=True)])

        numbers = {"window_left": -1, "window_right": -1, "top_left": False, "softcap": 0.0, "dropout_p": 0.0,
                   "scale": d**-0.5} | numbers  # fmt: skip
        self.call = AttentionCall(
            q=tensor((batch, heads, sq, d)),
            k=tensor((batch, kv_heads, sk, d)),
            v=tensor((batch, kv_heads, sk, dv)),
            bias=None if bias is None else scores(bias).to(bias_dtype or dtype),
            sink=randn(heads) if sink else None,
            mask=None if mask is None else scores(mask) > -0.3,
            seqlens_k=int32(lengths),
            cu_seqlens_q=int32(ends_q),
            cu_seqlens_k=int32(ends_k),
            alibi_slopes=slopes and randn(*{"heads": (heads,), "batch": (sequences, heads)}[slopes]).abs(),
            rng=torch.tensor([seed - 2**40, 7 * seed + 2**33], device=DEVICE) if numbers["dropout_p"] else None,
            max_seqlen_q=sq,
            max_seqlen_k=sk,
            **numbers,
        )
        self.do = randn(batch, heads, sq, dv).to(dtype)
        self.dlse = randn(batch, heads, sq)

    def replace(self, **fields):
        """Change fields of the call."""
        self.call = self.call._replace(**fields)

    def forward(self, backend="triton", need_low=True):
        """(out, lse, lse_low) by the raw op."""
        return getattr(torch.ops.fastattn.attention_fwd, backend)(*self.call, need_low)

    def backward_arguments(self, saved, do, dlse):
        """The arguments of the raw op after the forward that saved (out, lse, lse_low)."""
        return do, dlse, *self.call[:3], *saved, *self.call[3:], self.call.bias is not None, False

    def backward(self, saved, backend="triton"):
        """(dq, dk, dv, dbias, dsink) by the raw op."""
        return getattr(torch.ops.fastattn.attention_bwd, backend)(*self.backward_arguments(saved, self.do, self.dlse))

    def expected(self, dtype=None):
        """(out, lse, lse_low, gradients) of the reference, computed in `dtype` if given; None for absent inputs."""
        return self._expected(dtype)[:4]

    def _expected(self, dtype):
        """The same, and a function of the error of delta that returns what it adds to the gradients."""

        def convert(t):
            return t.to(dtype or t.dtype) if torch.is_tensor(t) and t.is_floating_point() else t

        leaves = [None if t is None else convert(t.detach()).clone().requires_grad_() for t in self.call[:5]]
        out, lse, low = _reference(*leaves, *map(convert, self.call[5:]), True)
        finite = torch.where(lse == -math.inf, 0.0, lse)  # the lse of an empty row has no gradient

        def gradients(results, flowing):
            if not results[0].requires_grad:  # lse of a call without keys
                return [None] * len(leaves)
            wanted = [t for t in leaves if t is not None]
            grads = iter(torch.autograd.grad(results, wanted, flowing, retain_graph=True, allow_unused=True))
            return [None if t is None else next(grads) for t in leaves]

        grads = gradients((out, finite), (convert(self.do), self.dlse.to(lse.dtype)))
        return out.detach(), lse.detach(), low.detach(), grads, lambda missed: gradients((finite,), (missed,))

    def check(self, saved_by="triton"):
        """Check the results of Triton's forward, and of its backward after the forward of `saved_by`."""
        exact_out, exact_lse, _, exact_grads, added_by = self._expected(torch.float64)
        *plain_saved, plain_grads = self.expected()
        out, lse, _ = saved = self.forward()
        assert_accurate(out, exact_out, plain_saved[0], what="out")
        seen = exact_lse != -math.inf
        assert torch.equal(lse != -math.inf, seen)
        if not torch.allclose(lse[seen].double(), exact_lse[seen], rtol=0, atol=2 * score_unit(exact_lse)):
            assert_accurate(lse[seen], exact_lse[seen], plain_saved[1][seen], what="lse")
        saved = plain_saved if saved_by == "reference" else saved
        do = self.do.double()
        by_delta = added_by((do * (saved[0].double() - exact_out)).sum(-1))
        names = ("dq", "dk", "dv", "dbias", "dsink")
        compared = zip(names, self.backward(saved), exact_grads, plain_grads, by_delta, strict=True)
        for name, got, right, plain, added in compared:
            if right is None:
                continue
            assert got.shape == right.shape, name
            slack = attention_slack(name, right, added, self.call, exact_lse, do * exact_out)
            if not torch.allclose(got.double(), right, rtol=0, atol=slack):
                assert_accurate(got, right, plain, factor=BACKWARD, what=name, slack=slack)


def random_options(seed):
    """The arguments of a small Case with any combination of features."""
    draw = random.Random(seed)

    def maybe(value, chance=0.3):
        return value if draw.random() < chance else None

    own_dims = [tuple(dim for dim in DIMS if draw.choice((True, False))) for _ in range(2)]
    kv_heads = draw.choice([1, 1, 2])
    options = {
        "heads": kv_heads * draw.choice([1, 1, 2]),
        "kv_heads": kv_heads,
        "d": draw.choice([8, 16, 24, 40, 59, 64]),
        "dv": draw.choice([None, None, 16, 48]),
        "dtype": draw.choice([torch.float32, torch.float16]),
        "sink": draw.random() < 0.25,
        "slopes": draw.choice([None, None, None, "heads", "batch"]),
        "dropout_p": draw.choice([0.0, 0.0, 0.1, 0.5]),
        "window_left": draw.choice([-1, -1, 0, 3, 20]),
        "window_right": draw.choice([-1, -1, 0, 0, 5]),
        "top_left": draw.random() < 0.3,
        "softcap": draw.choice([0.0, 0.0, 0.0, 1.5]),
        "seed": seed,
    }
    if options["top_left"]:  # only causal calls have it
        options["window_right"] = 0
    if draw.random() < 0.25:
        ends = [[0], [0]]
        for _ in range(draw.choice([1, 2, 3])):
            for side in ends:
                side.append(side[-1] + draw.choice([0, 1, 17, 40, 66]))
        options["packed"] = tuple(ends)
        sequences = len(ends[0]) - 1
    else:
        sequences = options["batch"] = draw.choice([1, 2])
        options["sq"], options["sk"] = (draw.choice([1, 9, 33, 64, 65, 97]) for _ in range(2))
        options["mask"], options["bias"] = map(maybe, own_dims)
        options["bshd"] = draw.random() < 0.5
    options["lengths"] = maybe([draw.choice([0, 5, 31, 64, 200]) for _ in range(sequences)])
    return options


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


def raw_arguments(q, k, v, bias=None, sink=None, mask=None, seqlens_k=None, ends=(None, None), alibi_slopes=None,
                  rng=None, window=(-1, -1), top_left=False, softcap=0.0, dropout_p=0.0):  # fmt: skip
    rest = (alibi_slopes, rng, q.shape[2], k.shape[2], *window, top_left, softcap, dropout_p, 0.25)
    return q, k, v, bias, sink, mask, seqlens_k, *ends, *rest
