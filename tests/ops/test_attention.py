"""Attention's public functions: the meaning of arguments, refused calls, and PyTorch's wrappers around a call."""

import math

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import reference


def normal(*shape, seed=0, dtype=torch.float32, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def qkv(batch=2, n_heads=4, seqlen_q=5, seqlen_k=7, head_dim=8, kv_heads=None, head_dim_v=None, **kwargs):
    kv_heads = n_heads if kv_heads is None else kv_heads
    return (
        normal(batch, n_heads, seqlen_q, head_dim, seed=1, **kwargs),
        normal(batch, kv_heads, seqlen_k, head_dim, seed=2, **kwargs),
        normal(batch, kv_heads, seqlen_k, head_dim_v or head_dim, seed=3, **kwargs),
    )


def by_hand(q, k, v, add=None, scale=None):
    """softmax(scale * q·k + add)·v in fp64 by the shortest formula, for equal numbers of heads; `add` may have -inf."""
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = torch.softmax(scores if add is None else scores + add, -1)
    return torch.nan_to_num(weights) @ v  # a row that sees nothing gives 0


def hidden(visible):
    return torch.where(visible, 0.0, -math.inf).double()


POSITIONS = [
    ({"causal": "top_left"}, lambda i, j, sq, sk: j <= i),
    ({"causal": True}, lambda i, j, sq, sk: j <= i + sk - sq),
    ({"causal": "bottom_right"}, lambda i, j, sq, sk: j <= i + sk - sq),
    ({"window": (1, 2)}, lambda i, j, sq, sk: (j >= i + sk - sq - 1) & (j <= i + sk - sq + 2)),
    ({"window": (1, None)}, lambda i, j, sq, sk: j >= i + sk - sq - 1),
    ({"window": (2, 5), "causal": "top_left"}, lambda i, j, sq, sk: (j >= i - 2) & (j <= i)),
]


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(5, 7), (7, 5), (1, 4), (4, 1)])
@pytest.mark.parametrize(("kwargs", "visible"), POSITIONS)
def test_causal_and_window_mean_what_they_say(kwargs, visible, seqlen_q, seqlen_k):
    q, k, v = qkv(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    i, j = torch.arange(seqlen_q)[:, None], torch.arange(seqlen_k)
    expected = by_hand(q, k, v, hidden(visible(i, j, seqlen_q, seqlen_k)))
    torch.testing.assert_close(fastattn.attention(q, k, v, **kwargs).double(), expected, atol=1e-6, rtol=1e-6)


def test_each_feature_alone_is_its_formula():
    q, k, v = qkv()
    i, j = torch.arange(5)[:, None], torch.arange(7)
    lengths = torch.tensor([7, 3], dtype=torch.int32)
    slopes, bias, sink = normal(4, seed=4).abs(), normal(2, 4, 5, 7, seed=5), normal(4, seed=6)
    mask = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(7)) > 0.4

    def check(expected, **kwargs):
        torch.testing.assert_close(fastattn.attention(q, k, v, **kwargs).double(), expected, atol=1e-6, rtol=1e-5)

    check(by_hand(q, k, v, scale=0.3), scale=0.3)
    check(by_hand(q, k, v, hidden(mask)), mask=mask)
    check(by_hand(q, k, v, bias.double()), bias=bias)
    check(by_hand(q, k, v, hidden(j < lengths.view(2, 1, 1, 1))), seqlens_k=lengths)
    check(by_hand(q, k, v, -slopes.double()[:, None, None] * (i + 2 - j).abs()), alibi_slopes=slopes)
    capped = 2 * torch.tanh(q.double() @ k.double().mT * 8**-0.5 / 2)
    check(torch.softmax(capped, -1) @ v.double(), softcap=2.0)
    # bottom-right alignment is relative to seqlens_k
    off = lengths.view(2, 1, 1, 1) - 5
    check(by_hand(q, k, v, hidden((j < lengths.view(2, 1, 1, 1)) & (j <= i + off))), seqlens_k=lengths, causal=True)
    scores = torch.cat([q.double() @ k.double().mT * 8**-0.5, sink.double().view(1, 4, 1, 1).expand(2, 4, 5, 1)], -1)
    check(torch.softmax(scores, -1)[..., :-1] @ v.double(), sink=sink)
    lse = fastattn.attention(q, k, v, sink=sink, return_lse=True)[1]
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-5, rtol=1e-5)


def test_grouped_heads_and_packed_sequences():
    q, k, v = qkv(n_heads=6, kv_heads=2, head_dim_v=5)
    expected = by_hand(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
    torch.testing.assert_close(fastattn.attention(q, k, v).double(), expected, atol=1e-6, rtol=1e-6)
    lens_q, lens_k = [3, 0, 2, 4], [2, 3, 0, 5]
    ends_q, ends_k = (torch.tensor([0, *lens]).cumsum(0).int() for lens in (lens_q, lens_k))
    q, k, v = normal(9, 4, 8, seed=1), normal(10, 2, 8, seed=2), normal(10, 2, 6, seed=3)
    kwargs = {"cu_seqlens_q": ends_q, "cu_seqlens_k": ends_k, "causal": True, "return_lse": True}
    out, lse = fastattn.attention(q, k, v, **kwargs)
    assert out.shape == (9, 4, 6)
    assert lse.shape == (4, 9)
    for b in range(4):
        of_q, of_k = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
        one = (t[rows].transpose(0, 1)[None] for t, rows in ((q, of_q), (k, of_k), (v, of_k)))
        out_b, lse_b = fastattn.attention(*one, causal=True, return_lse=True)
        torch.testing.assert_close(out[of_q], out_b[0].transpose(0, 1))
        torch.testing.assert_close(lse[:, of_q], lse_b[0])
    assert fastattn.attention(q, k, v, max_seqlen_q=4, max_seqlen_k=torch.tensor(5), **kwargs)[0].equal(out)


SDPA_SHAPES = [
    ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    ((5, 8), (7, 8), (7, 6)),
    ((3, 5, 8), (3, 7, 8), (3, 7, 6)),
    ((2, 1, 3, 5, 8), (4, 3, 7, 8), (4, 3, 7, 8)),
    ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    ((2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    ((0, 3, 5, 8), (0, 3, 7, 8), (0, 3, 7, 6)),
    ((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 6)),
    ((2, 3, 0, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
]


@pytest.mark.parametrize("shapes", SDPA_SHAPES)
def test_sdpa_gives_what_pytorch_gives(shapes):
    inputs = [normal(*shape, seed=n, grad=True) for n, shape in enumerate(shapes)]
    seqlens = shapes[0][-2], shapes[1][-2]
    masks = [torch.rand(seqlens, generator=torch.Generator().manual_seed(1)) > 0.3, normal(*seqlens, seed=5)]
    for kwargs in ({}, {"is_causal": True}, {"scale": 0.3}, *({"attn_mask": m} for m in masks)):
        expected = F.scaled_dot_product_attention(*inputs, **kwargs)
        out = fastattn.scaled_dot_product_attention(*inputs, **kwargs)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        cotangent = normal(*out.shape, seed=9)
        wanted = torch.autograd.grad(expected, inputs, cotangent)
        torch.testing.assert_close(torch.autograd.grad(out, inputs, cotangent), wanted, atol=1e-5, rtol=1e-5)


def test_sdpa_grouped_heads_and_layout():
    q, k, v = qkv(n_heads=6, kv_heads=2)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(fastattn.scaled_dot_product_attention(q, k, v, enable_gqa=True), expected)
    for order in ((0, 1, 2), (0, 2, 1), (2, 0, 1)):  # BHSD, BSHD, SBHD in memory
        inverse = [order.index(d) for d in range(3)]
        laid = [t.permute(*order, 3).contiguous().permute(*inverse, 3) for t in qkv()]
        out = fastattn.scaled_dot_product_attention(*laid)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(*qkv()))
        assert out.permute(*order, 3).is_contiguous()


@pytest.mark.parametrize(
    "change",
    [
        {"attn_mask": torch.ones(5, 7, dtype=torch.bool), "is_causal": True},
        {"attn_mask": torch.ones(6, dtype=torch.bool)},
        {"attn_mask": torch.ones(5, 7, dtype=torch.float64)},
        {"attn_mask": torch.ones(5, 7, dtype=torch.int32)},
        {"attn_mask": torch.ones(5, 6, dtype=torch.bool)},
        {"dropout_p": 1.5},
        {"key": torch.ones(2, 4, 7, 9)},
        {"key": torch.ones(2, 4, 6, 8)},
        {"key": torch.ones(2, 4, 7, 8, dtype=torch.bfloat16)},
        {"key": torch.ones(2, 3, 7, 8), "value": torch.ones(2, 3, 7, 8)},
        {"key": torch.ones(2, 3, 7, 8), "value": torch.ones(2, 3, 7, 8), "enable_gqa": True},
        {"query": torch.ones(8)},
        {"query": torch.ones(2, 4, 5, 8, dtype=torch.int64), "key": torch.ones(2, 4, 7, 8, dtype=torch.int64),
             "value": torch.ones(2, 4, 7, 8, dtype=torch.int64)},
    ],
)  # fmt: skip
def test_sdpa_names_mistakes(change):
    arguments = dict(zip(("query", "key", "value"), qkv(), strict=True)) | change
    with pytest.raises((ValueError, TypeError), match=r"scaled_dot_product_attention: .*got|dropout_p"):
        fastattn.scaled_dot_product_attention(**arguments)


REFUSED = [
    ({"q": torch.ones(4, 5, 8)}, ValueError, r"q must be \(batch, heads, seqlen, head_dim\), got shape \(4, 5, 8\)"),
    ({"k": torch.ones(2, 3, 7, 8), "v": torch.ones(2, 3, 7, 8)}, ValueError, "multiple of .* got 4 and 3"),
    ({"v": torch.ones(2, 4, 6, 8)}, ValueError, "k and v must agree"),
    ({"k": torch.ones(3, 4, 7, 8)}, ValueError, "the same batch size, got 2, 3"),
    ({"k": torch.ones(2, 4, 7, 9)}, ValueError, "the same head_dim, got 8 and 9"),
    ({"mask": torch.ones(5, 7)}, TypeError, "mask must be bool, True = attend, got torch.float32"),
    ({"mask": torch.ones(7, dtype=torch.bool)}, ValueError, "2 to 4 dimensions"),
    ({"mask": torch.ones(1, 2, 4, 5, 7, dtype=torch.bool)}, ValueError, "2 to 4 dimensions"),
    ({"mask": torch.ones(5, 6, dtype=torch.bool)}, ValueError, r"\(2, 4, 5, 7\), got \(5, 6\)"),
    ({"bias": torch.ones(5, 7, dtype=torch.int32)}, TypeError, "bias must have a floating-point dtype"),
    ({"bias": torch.ones(3, 1, 5, 7)}, ValueError, r"\(2, 4, 5, 7\), got \(3, 1, 5, 7\)"),
    ({"causal": "left"}, ValueError, "causal must be .* got 'left'"),
    ({"window": 3}, ValueError, r"pair \(left, right\), got 3"),
    ({"window": (3, -2)}, ValueError, r"at least -1 .* got \(3, -2\)"),
    ({"seqlens_k": torch.tensor([1, 2])}, TypeError, "seqlens_k must be int32, got torch.int64"),
    ({"seqlens_k": torch.tensor([1], dtype=torch.int32)}, ValueError, r"shape \(2,\), got \(1,\)"),
    ({"cu_seqlens_q": torch.tensor([0, 5], dtype=torch.int32)}, ValueError, "q must be .total, heads"),
    ({"max_seqlen_q": 3}, ValueError, "are for packed sequences"),
    ({"alibi_slopes": torch.ones(3)}, ValueError, r"\(4,\) or \(2, 4\), got \(3,\)"),
    ({"sink": torch.ones(4, 1)}, ValueError, r"\(4,\), got \(4, 1\)"),
    ({"sink": torch.ones(4, dtype=torch.int32)}, TypeError, "sink must be float32, got torch.int32"),
    ({"softcap": -1.0}, ValueError, "softcap must be .* got -1.0"),
    ({"scale": math.nan}, ValueError, "scale must be finite, got nan"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p must be between 0 and 1, got -0.1"),
    ({"seqlens_k": 7}, TypeError, "seqlens_k must be an int32 tensor, got int"),
    ({"deterministic": 2}, TypeError, "deterministic must be True or False or None, got int"),
    ({"backend": "cudnn"}, ValueError, "got 'cudnn'"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED)
def test_mistakes_are_named(change, error, message):
    arguments = dict(zip(("q", "k", "v"), qkv(), strict=True)) | change
    with pytest.raises(error, match=message):
        fastattn.attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def test_packed_mistakes_are_named():
    q, k, v = normal(9, 4, 8), normal(10, 4, 8), normal(10, 4, 8)
    good = {"cu_seqlens_q": torch.tensor([0, 9]).int(), "cu_seqlens_k": torch.tensor([0, 10]).int()}
    for change, error, message in (
        ({"cu_seqlens_k": None}, ValueError, "given together"),
        ({"cu_seqlens_q": torch.tensor([0, 9])}, TypeError, "int32"),
        (
            {"cu_seqlens_q": torch.tensor([0, 12]).int()},
            ValueError,
            r"from 0 to at most the total length 9, got \[0, 12",
        ),
        ({"cu_seqlens_q": torch.tensor([0, -3]).int()}, ValueError, r"got \[0, -3\]"),
        ({"cu_seqlens_q": torch.empty(0).int(), "cu_seqlens_k": torch.empty(0).int()}, ValueError, "got none"),
        ({"cu_seqlens_k": torch.tensor([0, 11, 10]).int()}, ValueError, r"shape \(2,\), got \(3,\)"),
        ({"cu_seqlens_k": torch.tensor([1, 10]).int()}, ValueError, r"got \[1, 10\]"),
        ({"mask": torch.ones(9, 10, dtype=torch.bool)}, ValueError, "neither mask nor bias"),
    ):
        with pytest.raises(error, match=message):
            fastattn.attention(q, k, v, **(good | change))


def test_autocast_casts_q_k_v_and_nothing_else():
    q, k, v = qkv(grad=True)
    bias = normal(5, 7, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = fastattn.attention(q, k, v, bias=bias)
        assert fastattn.attention(q.double(), k.double(), v.double()).dtype == torch.float64
    assert out.dtype == torch.bfloat16
    expected = fastattn.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), bias=bias)
    assert out.equal(expected)
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v, bias))
    assert [g.dtype for g in grads] == [torch.float32] * 4


def test_fp64_and_transforms_use_the_reference():
    q, k, v = qkv(dtype=torch.float64, grad=True, batch=1, n_heads=2, seqlen_q=3, seqlen_k=4, head_dim=3)
    bias, sink = normal(3, 4, seed=8, dtype=torch.float64, grad=True), normal(2, seed=9, dtype=torch.float64, grad=True)

    def call(q, k, v, bias, sink):
        return fastattn.attention(q, k, v, bias=bias, sink=sink, causal=True, softcap=3.0, return_lse=True)

    assert torch.autograd.gradcheck(call, (q, k, v, bias, sink))
    q, k, v = (t.detach().float() for t in (q, k, v))
    per_head = torch.func.vmap(lambda q, k, v: fastattn.attention(q[None, None], k[None, None], v[None, None])[0, 0])
    torch.testing.assert_close(per_head(q[0], k[0], v[0]), fastattn.attention(q, k, v)[0])
    tangent = normal(*q.shape, seed=11)
    expected = torch.func.jvp(lambda q: reference.attention(q, k, v)[0], (q,), (tangent,))[1]
    got = torch.func.jvp(lambda q: fastattn.attention(q, k, v), (q,), (tangent,))[1]
    torch.testing.assert_close(got, expected)


def test_explain_says_what_runs_and_why():
    q, k, v = qkv()
    text = fastattn.explain("attention", q, k, v, causal=True, backend="reference")
    assert "reference: runs" in text
    assert "native:" in text
    text = fastattn.explain("attention", q.double(), k.double(), v.double())
    assert "reference: runs" in text
    assert "got torch.float64" in text or "not built" in text
    with pytest.raises(ValueError, match="the same head_dim"):
        fastattn.explain("attention", q, k[..., :4], v)
