"""A finite mask is a number, whatever its size: rows at -1e4, -1e9, -FLT_MAX or +1e38 against the reference in fp64.

A row is empty only because of -inf, a boolean mask, causal, window or length. Each row of a bias is of another kind
and is judged by itself, so that large numbers in one row do not hide errors in another. If the queries are zeros, all
scores of a row are equal: fp32 then loses nothing next to the bias, and the results must be right to rounding. With
random queries it does lose digits, and PyTorch's own error is the bound.
"""

import math

import nn_oracle
import pytest
import torch
from attention_cases import normal, on, results
from finite_mask_cases import LARGEST, SK, SQ, assert_right, bias_of_all_kinds, expected_results, inputs, row_kinds
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn.ops._backends import why_not_available
from fastattn.ops.attention import _reference

OP = "attention"

pytestmark = [
    # from numpy, in the interpreter: differences of numbers near FLT_MAX
    pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered"),
]


@pytest.fixture
def size(interpreted):
    return (40, 70) if interpreted else (SQ, SK)


def check(what, q, k, v, *, backend, device, names=None, **kwargs):
    """`names` of the results that are judged; all if None."""
    kwargs = {"softcap": 0.0} | kwargs
    truth, baseline = expected_results(q, k, v, kwargs)
    q, k, v = on(device, q, k, v)
    kwargs = dict(zip(kwargs, on(device, *kwargs.values()), strict=True))
    got = {name: t.cpu() for name, t in results(q, k, v, kwargs, backend).items()}
    assert_right(got, {name: truth[name] for name in names or truth}, baseline, what)


FEATURES = {
    "nothing else": {},
    "causal": {"causal": True},
    "top left and a window": {"causal": "top_left", "window": (40, 0)},
    "lengths": {"seqlens_k": torch.tensor([50], dtype=torch.int32)},
    "a mask": {"mask": True},
    "softcap": {"softcap": 3.0},
    "dropout": {"dropout_p": 0.2},
    "a sink": {"sink": torch.tensor([0.5, -1e9])},
    "ALiBi": {"alibi_slopes": torch.tensor([0.5, 0.03])},
}


@pytest.mark.parametrize("scores", ["zero", "random"])
@pytest.mark.parametrize("features", FEATURES)
def test_rows_of_every_kind(features, scores, backend, device, size):
    kwargs = dict(FEATURES[features])
    if "mask" in kwargs:
        kwargs["mask"] = (torch.arange(size[1]) % 7 != 3).expand(size)
    if "sink" in kwargs:
        kwargs["sink"] = kwargs["sink"].clone().requires_grad_()
    q, k, v = inputs(scores, size=size)
    check(features, q, k, v, bias=bias_of_all_kinds((2, *size)), **kwargs, backend=backend, device=device)


def test_a_kind_of_row_for_all_queries(backend, device, size, interpreted):
    """A bias without rows, like padding: one number per key. Its gradients are sums over equal rows."""
    q, k, v = inputs("zero", size=size, kv_heads=1)
    for name, row in list(row_kinds(size[1]).items())[:: 5 if interpreted else 1]:
        bias = row.view(1, 1, 1, -1).requires_grad_()
        check(name, q, k, v, bias=bias, backend=backend, device=device)


HIDDEN = {  # by masks of one row for all queries: the Triton kernels then read fewer blocks, or no mask at all
    "at the end": lambda key, sk: key >= sk // 2,
    "at the start": lambda key, sk: key < sk // 2 + 3,
    "in between": lambda key, sk: key % 7 == 3,
    "all but two": lambda key, sk: (key != 5) & (key != sk - 1),
}


@pytest.mark.parametrize("hidden", HIDDEN)
def test_beside_hidden_keys(hidden, dtype, backend, device, interpreted):
    """A row whose visible keys all have -1e9 or finfo.min is the mean of their values, wherever the others are."""
    sq, sk = (20, 140) if interpreted else (SQ, SK)
    mask = ~HIDDEN[hidden](torch.arange(sk), sk).view(1, 1, 1, sk)
    q, k, v = inputs("zero", dtype, (sq, sk), kv_heads=1)
    bias = bias_of_all_kinds((sq, sk), dtype)
    for kwargs in ({}, {"causal": True, "window": (sk - 9, 0)}):
        check(hidden, q, k, v, bias=bias, mask=mask, **kwargs, backend=backend, device=device)


@pytest.mark.parametrize("shape", [(1, 1, SQ, 1), (1, 2, 1, 1), (1, 1)])
def test_a_number_for_whole_rows(shape, backend, device):
    """A bias that is broadcast over the keys; its gradients sum to 0."""
    q, k, v = inputs("random")
    for value in (-LARGEST, -1e9, 2.4e38):
        bias = torch.full(shape, value).requires_grad_()
        check(value, q, k, v, bias=bias, backend=backend, device=device)


@pytest.mark.parametrize("scores", ["zero", "random"])
def test_half_precision(scores, dtype, backend, device, size):
    q, k, v = inputs(scores, dtype, size)
    for bias_dtype in {torch.float32, dtype}:
        check(bias_dtype, q, k, v, bias=bias_of_all_kinds(size, bias_dtype), backend=backend, device=device)


@pytest.mark.parametrize("value", [1e4, 1e9, 1e38, LARGEST])
def test_large_sinks(value, backend, device, size):
    """With scores without a bias, with rows of a bias of every kind, and in rows that have nothing else."""
    sink = torch.tensor([value, -value]).requires_grad_()
    for dtype in (torch.float16, torch.float32):
        q, k, v = inputs("random", dtype, size)
        check(dtype, q, k, v, sink=sink, causal="top_left", backend=backend, device=device)
    lengths = torch.tensor([0], dtype=torch.int32)
    check("nothing else", q, k, v, sink=sink, seqlens_k=lengths, backend=backend, device=device)
    q, k, v = inputs("zero", size=size)
    check("bias", q, k, v, sink=sink, bias=bias_of_all_kinds((2, *size)), backend=backend, device=device)


@pytest.mark.parametrize("slope", [0.5, 1e3, 1e7])
def test_alibi_far_from_all_keys(slope, backend, device, interpreted):
    """With top-left alignment the last queries are far past the last key."""
    slopes = torch.tensor([slope, slope / 3])
    q, k, v = inputs("random", size=(70, 20) if interpreted else (130, 40))
    for kwargs in ({"causal": "top_left"}, {"causal": "top_left", "window": (50, 0)}, {}):
        check(list(kwargs), q, k, v, alibi_slopes=slopes, **kwargs, backend=backend, device=device)
    q, k, v = (normal(n, 2, 8, seed=n) for n in (70, 21, 21))
    ends = torch.tensor([0, 30, 70]).int(), torch.tensor([0, 1, 21]).int()
    packed = {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1], "causal": "top_left"}
    check("packed", q, k, v, alibi_slopes=slopes, **packed, backend=backend, device=device)


def test_large_scores_without_a_mask(backend, device, size, interpreted):
    """If one key dominates a row, lse loses the difference of its p from 1. dq and dk are left out: they multiply
    dp - delta, which PyTorch computes as exactly 0 there, by hundreds."""
    if interpreted:
        pytest.skip("numpy sums k·q in another order than q·k, which shows where scores are 1e5")
    q, k, v = (t.detach() * 100 for t in inputs("random", size=size))
    q, k, v = q.requires_grad_(), k.requires_grad_(), (v / 100).requires_grad_()
    names = ("out", "lse", "dv")
    check("plain", q, k, v, names=names, backend=backend, device=device)
    check("causal", q, k, v, names=names, causal=True, backend=backend, device=device)


def raw_call(backend, direction, *arguments):
    if backend == "reference":
        return tuple(t.detach() for t in _reference(*arguments))
    return getattr(getattr(torch.ops.fastattn, f"attention_{direction}"), backend)(*arguments)


def skip_unless_served(backends, q, k, v, bias, sink):
    """The kernels for Hopper take no bias, and the raw ops do not ask: the public function says so."""
    for name in backends:
        answer = fastattn.explain("attention", q, k, v, bias=bias, sink=sink, backend=name)
        line = next(line.strip() for line in answer.splitlines() if line.strip().startswith(f"{name}: "))
        if line.startswith(f"{name}: no: "):
            assert q.is_cuda, line
            pytest.skip(line)


@pytest.mark.parametrize(
    "order", [("reference", "native"), ("reference", "triton"), ("native", "triton"), ("triton", "native")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_forward_on_one_backend_and_backward_on_another(order, dtype, device):
    for name in order:
        if reason := why_not_available(name, device):
            pytest.skip(f"{name} cannot run here: {reason}")
    seqlen_q, seqlen_k = size = (40, 70) if "triton" in order and device == "cpu" else (SQ, SK)
    for scores in ("zero", "random"):
        q, k, v = inputs(scores, dtype, size)
        bias, sink = bias_of_all_kinds((1, 2, *size)), torch.tensor([1e9, -2e4]).requires_grad_()
        truth, baseline = expected_results(q, k, v, {"bias": bias, "sink": sink})
        moved = [t.detach() for t in on(device, q, k, v, bias, sink)]
        skip_unless_served(order, *moved)
        rest = (None, None, None, None, None, None, seqlen_q, seqlen_k, -1, -1, False, 0.0, 0.0, 8**-0.5)
        out, lse, low = raw_call(order[0], "fwd", *moved, *rest, True)
        generator = torch.Generator().manual_seed(1)
        do = torch.randn(out.shape, generator=generator).to(device, dtype)
        dlse = torch.randn(lse.shape, generator=generator).to(device)
        grads = raw_call(order[1], "bwd", do, dlse, *moved[:3], out, lse, low, *moved[3:], *rest, True, False)
        got = {"out": out, "lse": lse} | dict(zip(("dq", "dk", "dv", "dbias", "dsink"), grads, strict=True))
        assert_right({name: t.cpu() for name, t in got.items()}, truth, baseline, scores)


def test_where_another_backend_rounded_the_scores_otherwise():
    """One unit of a score of 1e9 is 64: it must not turn a weight into a power of e."""
    if reason := why_not_available("native", "cpu"):
        pytest.skip(reason)
    q, k, v = (t.detach() for t in inputs("zero"))
    bias = torch.full((1, 1, SQ, SK), -1e9)
    lse, low = torch.full((1, 2, SQ), -1e9 - 64), torch.full((1, 2, SQ), math.log(SK))
    out, do = torch.zeros_like(q), torch.ones_like(q)
    rest = (bias, None, None, None, None, None, None, None, SQ, SK, -1, -1, False, 0.0, 0.0, 1.0)
    dv = torch.ops.fastattn.attention_bwd.native(do, None, q, k, v, out, lse, low, *rest, False, False)[2]
    torch.testing.assert_close(dv, torch.full_like(dv, SQ / SK))


def test_transforms_and_double_backward():
    """They run on the reference, whatever ran before."""
    q, k, v = inputs("zero", size=(20, 9))
    bias = bias_of_all_kinds((20, 9))

    def second(*tensors, dtype):
        q, k, v, bias = (t.detach().to(dtype).requires_grad_() for t in tensors)
        out = fastattn.attention(q, k, v, bias=bias)
        grads = torch.autograd.grad(out.square().sum(), (q, k, v, bias), create_graph=True)
        return *grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v, bias))

    for got, expected in zip(
        second(q, k, v, bias, dtype=torch.float32), second(q, k, v, bias, dtype=torch.float64), strict=True
    ):
        torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-5)
    rows = torch.func.vmap(lambda q, bias: fastattn.attention(q[None], k, v, bias=bias[None, None]))
    got = rows(q.permute(2, 1, 0, 3), bias)
    torch.testing.assert_close(got[:, 0, :, 0].transpose(0, 1), fastattn.attention(q, k, v, bias=bias)[0])


def with_equal_scores(module):
    with torch.no_grad():
        module.in_proj_weight[: module.embed_dim] = 0
        module.in_proj_bias[: module.embed_dim] = 0
    return module


def layer_masks(value):
    """Float masks for three samples of nine tokens: one sample or some of its keys, some pairs, all together."""
    padding, pairs = torch.zeros(3, 9), torch.zeros(9, 9)
    padding[0] = padding[1, 5:] = value
    causal = torch.full((9, 9), value).triu(1)
    pairs[3] = pairs[:, 4] = value
    return {
        "padding": {"key_padding_mask": padding},
        "pairs": {"attn_mask": pairs},
        "causal and padding": {"key_padding_mask": padding, "attn_mask": causal},
        "bool beside float": {"key_padding_mask": padding, "attn_mask": torch.ones(9, 9, dtype=torch.bool).triu(1)},
    }


@pytest.mark.parametrize("value", [-1e4, -1e6, -1e9, -LARGEST, 1e38])
def test_layers_and_their_weights(value, dtype):
    """Outputs, weights, and gradients through both, against torch.nn; the output alone is computed without weights."""
    value = min(max(value, torch.finfo(dtype).min), torch.finfo(dtype).max / 4)
    for scores in ("equal", "random"):
        ours, theirs = nn_oracle.pair("MultiheadAttention", 16, 2, batch_first=True, dtype=dtype)
        if scores == "equal":
            ours, theirs = with_equal_scores(ours), with_equal_scores(theirs)
        x = torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
        for masks in layer_masks(value).values():
            masks = {name: mask if mask.dtype == torch.bool else mask.to(dtype) for name, mask in masks.items()}
            for options in ({"average_attn_weights": False}, {"need_weights": False}):
                nn_oracle.compare(
                    ours, theirs, lambda m, x, o=options, **masks: m(x, x, x, **masks, **o), {"x": x} | masks
                )


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
@pytest.mark.parametrize("value", [-1e4, -1e9, -LARGEST, 1e38])
def test_whole_layers(value, name, dtype):
    """On a CPU they are one node with attention inside, in training and in evaluation. The backward of torch's fused
    kernel has the fault that this file is about, so torch.nn runs on plain operators."""
    value = min(max(value, torch.finfo(dtype).min), torch.finfo(dtype).max / 4)
    masks = {key: mask.to(dtype) for key, mask in (layer_masks(value)["padding"] | layer_masks(value)["pairs"]).items()}
    if abs(value) > 1e30:
        del masks["key_padding_mask"]  # their sum is not finite
    x = torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    for norm_first, training in ((False, True), (True, True), (False, False)):
        options = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first, "activation": "gelu"}
        modules = nn_oracle.pair(name, 16, 2, 32, **options, dtype=dtype)
        ours, theirs = (m.train(training) for m in modules)
        for module in (ours, theirs):
            with_equal_scores(module.self_attn)
        prefix = "src" if name == "TransformerEncoderLayer" else "tgt"

        def call(module, x, attn_mask, key_padding_mask=None, prefix=prefix):
            given = {f"{prefix}_mask": attn_mask, f"{prefix}_key_padding_mask": key_padding_mask}
            with sdpa_kernel(SDPBackend.MATH):
                return module(x, **given) if prefix == "src" else module(x, x, **given)

        nn_oracle.compare(ours, theirs, call, {"x": x} | masks)


def test_masks_whose_sum_is_below_all_numbers():
    """torch.nn gives NaN for a row in which both masks hide every key with -FLT_MAX; fp64 gives the mean of v."""
    ours, theirs = nn_oracle.pair("MultiheadAttention", 16, 2, batch_first=True)
    ours, theirs = with_equal_scores(ours), with_equal_scores(theirs).double()
    x = torch.randn(1, 9, 16, requires_grad=True)
    rows, padding = torch.zeros(9, 9), torch.full((1, 9), -LARGEST)
    rows[2], rows[5, 3:] = -LARGEST, -LARGEST
    got = ours(x, x, x, key_padding_mask=padding, attn_mask=rows)
    expected = theirs(*(x.double(),) * 3, key_padding_mask=padding.double(), attn_mask=rows.double())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-6, rtol=1e-6)
    assert torch.autograd.grad(got[0].sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sum_of_large_scores(dtype):
    """Scores of 2e5, where fp32 has steps of 1/64: the saved statistics must not lose the sum of a row."""
    generator = torch.Generator().manual_seed(0)
    q, k = ((200 * torch.randn(2, 2, 64, 16, generator=generator)).to(dtype) for _ in range(2))
    v, do = (torch.randn(2, 2, 64, 16, generator=generator).to(dtype) for _ in range(2))

    def dv(v, *others, **options):
        leaf = v.clone().requires_grad_()
        return torch.autograd.grad(fastattn.attention(*others, leaf, **options), leaf, do.to(v.dtype))[0].double()

    truth = dv(v.double(), q.double(), k.double(), backend="reference")
    errors = [(dv(v, q, k, backend=name) - truth).norm() / truth.norm() for name in ("auto", "reference")]
    assert errors[0] <= 3 * errors[1] + 4 * torch.finfo(dtype).eps * (dtype == torch.float32)


def test_weights_of_large_scores():
    """Without a mask: rows that one key dominates."""
    ours, theirs = nn_oracle.pair("MultiheadAttention", 16, 2, batch_first=True)
    x = torch.randn(2, 33, 16, generator=torch.Generator().manual_seed(0)) * 100
    nn_oracle.compare(ours, theirs, lambda m, x: m(x, x, x, average_attn_weights=False), {"x": x})


def test_weights_of_keys_that_a_bias_hides():
    module = fastattn.nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(1, 9, 16)
    key = x.clone()
    key[:, 5] = math.nan
    mask = torch.zeros(1, 9).masked_fill(torch.arange(9) == 5, -math.inf)
    with torch.no_grad():
        got, expected = (module(x, k, k, key_padding_mask=mask) for k in (key, x))
    assert got[1].equal(expected[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_masks_beyond_fp32(dtype):
    """A bias in fp64 runs on the reference whatever the dtype of q, and may have any fp64 number."""
    q, k, v = (torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(n)).to(dtype) for n in range(3))
    bias = torch.zeros(6, 6, dtype=torch.float64)
    bias[0], bias[1], bias[2, 1:], bias[3, 4], bias[4, :3], bias[5] = -1e300, 1e300, -1e300, 1e300, -1e300, -math.inf
    leaves = [t.requires_grad_() for t in (q, k, v, bias)]
    out, lse = fastattn.attention(*leaves[:3], bias=bias, return_lse=True)
    assert "reference: runs" in fastattn.explain("attention", q, k, v, bias=bias)
    grads = torch.autograd.grad(out[..., 0].sum(), leaves)
    mean, atol = v.double().mean(-2), 1e-2 if dtype == torch.bfloat16 else 1e-6
    for row, expected in {0: mean, 1: mean, 2: v[:, :, 0].double(), 3: v[:, :, 4].double(), 5: 0 * mean}.items():
        torch.testing.assert_close(out[:, :, row].double(), expected, atol=atol, rtol=0)
    assert all(t.isfinite().all() for t in (out, *grads))
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    assert lse[..., :5].isfinite().all()
    assert (lse[..., 5] == -math.inf).all()
    (dv,) = torch.autograd.grad(fastattn.attention(q, k, v, bias=bias)[..., 0, 0].sum(), v)
    torch.testing.assert_close(dv[..., 0].double(), torch.full((1, 2, 6), 1 / 6).double(), atol=atol, rtol=0)
    for name in ("native", "triton"):
        if why_not_available(name, "cpu") is None:
            with pytest.raises(ValueError, match="float64"):
                fastattn.attention(q, k, v, bias=bias, backend=name)
