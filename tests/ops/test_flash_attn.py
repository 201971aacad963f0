"""flash-attn's functions: signatures, meaning, layouts, and the differences that docs/flash-attn.md lists."""

import inspect

import pytest
import torch
from attention_cases import DTYPES, check, normal, results

import fastattn
from fastattn.integrations import flash_attn
from fastattn.ops.attention import _ops

OP = "attention"

TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,"
    " deterministic=False, return_attn_probs=False"
)
VARLEN = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"(q, k, v, {TAIL})",
    "flash_attn_kvpacked_func": f"(q, kv, {TAIL})",
    "flash_attn_qkvpacked_func": f"(qkv, {TAIL})",
    "flash_attn_varlen_func": f"(q, k, v, {VARLEN}, {TAIL}, block_table=None)",
    "flash_attn_varlen_kvpacked_func": f"(q, kv, {VARLEN}, {TAIL})",
    "flash_attn_varlen_qkvpacked_func": f"(qkv, cu_seqlens, max_seqlen, {TAIL})",
    "flash_attn_with_kvcache": (
        "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,"
        " cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,"
        " window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,"
        " return_softmax_lse=False)"
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_that_of_flash_attn(name):
    signature = inspect.signature(getattr(flash_attn, name))
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]  # flash-attn has no annotations
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


def swapped(*tensors):
    return [t.transpose(1, 2) for t in tensors]


def entry(name):
    """The function of flash-attn in place of `fastattn.attention`, so that one oracle judges both."""
    function = getattr(flash_attn, name)
    varlen = "varlen" in name

    def call(
        q, k, v, *, return_lse, backend, cu_seqlens_q=None, cu_seqlens_k=None, scale=None, window=(-1, -1), **rest
    ):
        if varlen:
            longest = [int(ends.diff().max()) for ends in (cu_seqlens_q, cu_seqlens_k)]
            lengths = (cu_seqlens_q, cu_seqlens_k, *longest)
        else:
            q, k, v = swapped(q, k, v)
            lengths = ()
        if "qkvpacked" in name:
            tensors, lengths = (torch.stack((q, k, v), -3),), lengths[::2]
        elif "kvpacked" in name:
            tensors = q, torch.stack((k, v), -3)
        else:
            tensors = q, k, v
        with fastattn.use_backend(backend or "auto"):
            out, lse, weights = function(
                *tensors, *lengths, softmax_scale=scale, window_size=window, return_attn_probs=True, **rest
            )
        assert weights is None
        return (out if varlen else out.transpose(1, 2)), lse

    return call


FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (9, 2), "scale": 0.3},
    "softcap and ALiBi": {"softcap": 2.0, "alibi_slopes": torch.tensor([0.1, 0.4])},
    "everything": {"causal": True, "window": (20, -1), "softcap": 3.0, "dropout_p": 0.2, "scale": 0.2,
                   "alibi_slopes": torch.tensor([[0.1, 0.4], [0.2, 0.3], [0.0, 0.6]])},
}  # fmt: skip


def check_entry(monkeypatch, name, features, backend=None, device="cpu"):
    kwargs = dict(FEATURES[features])
    dtype = torch.float16 if features == "causal" else torch.float32
    n_kv_heads = 2 if "qkv" in name else 1
    if "varlen" in name:
        lens_q, lens_k = [17, 0, 30], [9, 4, 40]
        if "qkv" in name:
            lens_k = lens_q
        q, k, v = (
            normal(sum(lens), heads, 16, seed=n, dtype=dtype)
            for n, (lens, heads) in enumerate(((lens_q, 2), (lens_k, n_kv_heads), (lens_k, n_kv_heads)))
        )
        for label, lens in (("cu_seqlens_q", lens_q), ("cu_seqlens_k", lens_k)):
            kwargs[label] = torch.tensor([0, *lens]).cumsum(0).int()
    else:
        seqlen_k = 33 if "qkv" in name else 50
        q = normal(3, 2, 33, 16, dtype=dtype)
        k, v = (normal(3, n_kv_heads, seqlen_k, 16, seed=n, dtype=dtype) for n in (1, 2))
    check(monkeypatch, name, q, k, v, backend=backend, device=device, call=entry(name), **kwargs)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("name", list(SIGNATURES)[:-1])
def test_values_and_gradients(name, features, monkeypatch):
    check_entry(monkeypatch, name, features)


@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func"])
def test_on_every_backend(name, backend, device, monkeypatch):
    check_entry(monkeypatch, name, "everything", backend, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(SIGNATURES)[:-1])
def test_every_bit_is_that_of_attention(name, dtype):
    """This includes dropout masks, because the generator is used in the same way."""
    kwargs = {"causal": True, "dropout_p": 0.3}
    if "varlen" in name:
        q, k, v = (normal(40, 2, 16, seed=n, dtype=dtype) for n in range(3))
        kwargs["cu_seqlens_q"] = kwargs["cu_seqlens_k"] = torch.tensor([0, 11, 40], dtype=torch.int32)
    else:
        q, k, v = (normal(2, 2, 30, 16, seed=n, dtype=dtype) for n in range(3))
    got, expected = (results(q, k, v, kwargs, None, call=call) for call in (entry(name), fastattn.attention))
    assert all(got[key].equal(value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "visible"),
    [(2, 5, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]), (5, 2, [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]])],
)
def test_causal_is_aligned_bottom_right(seqlen_q, seqlen_k, visible):
    q, k = (normal(1, n, 1, 8, seed=n).detach() for n in (seqlen_q, seqlen_k))
    v = torch.eye(seqlen_k)[None, :, None]
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    visible = torch.tensor(visible, dtype=torch.bool)
    assert (out[0, :, 0] != 0).equal(visible)
    assert (lse[0, 0] == -torch.inf).equal(~visible.any(-1))  # flash-attn gives +inf to a row that sees nothing
    ends = [torch.tensor([0, n], dtype=torch.int32) for n in (seqlen_q, seqlen_k)]
    packed = flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], *ends, seqlen_q, seqlen_k, causal=True)
    assert packed.equal(out[0])
    left = flash_attn.flash_attn_func(q, k, v, window_size=(1, 0))  # the last query sees the last two keys
    assert (left[0, -1, 0] != 0).nonzero().flatten().tolist() == [seqlen_k - 2, seqlen_k - 1]


class TestLayouts:
    @pytest.fixture
    def inputs(self, monkeypatch):
        """The q, k and v that reach the raw op."""
        seen = []
        raw = _ops["fwd"]["native"]
        monkeypatch.setitem(_ops["fwd"].direct, "native", lambda *args: seen.extend(args[:3]) or raw(*args))
        if fastattn.backends()["cpu"]["native"] != "available":
            pytest.skip("the native backend is not built")
        return seen

    def check(self, inputs, views, out):
        for got, view in zip(inputs, views, strict=True):
            assert got.data_ptr() == view.data_ptr()
            assert got.shape == view.shape
            assert got.stride() == view.stride()
        assert out.is_contiguous()

    def test_batched(self, inputs):
        q, k, v = (normal(2, n, 4, 8) for n in (5, 7, 7))
        out = flash_attn.flash_attn_func(q, k, v)
        self.check(inputs, swapped(q, k, v), out)
        out.sum().backward()
        assert all(t.grad.is_contiguous() for t in (q, k, v))

    def test_packed_in_one_tensor(self, inputs):
        qkv = normal(2, 5, 3, 4, 8)
        out = flash_attn.flash_attn_qkvpacked_func(qkv)
        self.check(inputs, swapped(*qkv.unbind(2)), out)
        inputs.clear()
        q, kv = normal(2, 6, 4, 8), normal(2, 5, 2, 2, 8)
        out = flash_attn.flash_attn_kvpacked_func(q, kv)
        self.check(inputs, swapped(q, *kv.unbind(2)), out)

    def test_varlen(self, inputs):
        ends = torch.tensor([0, 3, 9], dtype=torch.int32)
        qkv = normal(9, 3, 4, 8)
        out = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, ends, 6)
        self.check(inputs, [t.transpose(0, 1)[None] for t in qkv.unbind(1)], out)


def test_attn_probs_are_lse_and_no_weights():
    q, k, v = (normal(2, 6, 2, 8, seed=n) for n in range(3))
    for dropout_p in (0.0, 0.5):
        out, lse, weights = flash_attn.flash_attn_func(q, k, v, dropout_p, return_attn_probs=True)
        assert (out.shape, lse.shape, lse.dtype, weights) == ((2, 6, 2, 8), (2, 2, 6), torch.float32, None)
    scores = (q.transpose(1, 2) @ k.transpose(1, 2).mT) * 8**-0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    gradients = torch.autograd.grad(lse.sum(), (q, k))
    torch.testing.assert_close(gradients, torch.autograd.grad(scores.logsumexp(-1).sum(), (q, k)))
    ends = torch.tensor([0, 2, 6], dtype=torch.int32)
    assert flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], ends, ends, 4, 4, return_attn_probs=True)[1].shape == (
        2,
        6,
    )


def test_lse_of_causal_alibi_counts_the_distance():
    """flash-attn leaves a constant per row out of it; the weights are the same."""
    q, k, v = (normal(1, 5, 2, 8, seed=n).detach() for n in range(3))
    slopes = torch.tensor([0.3, 0.7])
    lse = flash_attn.flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes, return_attn_probs=True)[1]
    i, j = torch.arange(5)[:, None], torch.arange(5)
    scores = (q.transpose(1, 2) @ k.transpose(1, 2).mT) * 8**-0.5 - slopes[:, None, None] * (i - j)
    torch.testing.assert_close(lse, scores.masked_fill(j > i, -torch.inf).logsumexp(-1))


@pytest.mark.parametrize("deterministic", [False, True])
def test_backward_is_deterministic_whatever_is_asked(deterministic):
    q, k, v = (normal(1, 150, 2, 16, seed=n) for n in range(3))
    runs = []
    for _ in range(3):
        torch.manual_seed(0)
        out = flash_attn.flash_attn_func(q, k, v, 0.1, deterministic=deterministic)
        runs.append(torch.autograd.grad(out.sum(), (q, k, v)))
    assert all(a.equal(b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_what_flash_attn_refuses_and_is_served_here():
    q, k = normal(1, 5, 2, 12), normal(1, 7, 1, 12, seed=1)
    v = normal(1, 7, 1, 20, seed=2)  # head dims that are no multiples of 8 and differ, fp32, softcap with dropout
    assert flash_attn.flash_attn_func(q, k, v, 0.5, softcap=2.0).shape == (1, 5, 2, 20)
    with torch.autocast("cpu", torch.bfloat16):
        assert flash_attn.flash_attn_func(q, k, v).dtype == torch.bfloat16


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    q, k, v = (normal(2, 9, 2, 8, seed=n) for n in range(3))

    def call(q, k, v):
        return flash_attn.flash_attn_func(q * 2, k, v, causal=True, window_size=(3, 0), return_attn_probs=True)[:2]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, expected = compiled(q, k, v), call(q, k, v)
    torch.testing.assert_close(got, expected)
    grads = (torch.autograd.grad(out.square().sum(), (q, k, v)) for out, _ in (got, expected))
    torch.testing.assert_close(*grads)


QKV = (torch.ones(2, 5, 4, 8),) * 3
PACKED = (torch.ones(5, 4, 8),) * 3
ENDS = torch.tensor([0, 5], dtype=torch.int32)
REFUSED = [
    ("flash_attn_func", PACKED, {}, r"q must be \(batch, seqlen, heads, head_dim\), got shape \(5, 4, 8\)"),
    ("flash_attn_func", (QKV[0], QKV[1][:, :, :3], QKV[2][:, :, :3]), {}, "multiple of .* got 4 and 3"),
    ("flash_attn_func", QKV, {"window_size": (-2, 0)}, r"at least -1 .* got \(-2, 0\)"),
    ("flash_attn_func", QKV, {"alibi_slopes": torch.ones(3)}, r"\(4,\) or \(2, 4\), got \(3,\)"),
    ("flash_attn_func", QKV, {"dropout_p": 2.0}, "between 0 and 1, got 2.0"),
    ("flash_attn_qkvpacked_func", (torch.ones(2, 5, 2, 4, 8),), {}, r"qkv must be \(batch, seqlen, 3, heads"),
    ("flash_attn_kvpacked_func", (QKV[0], torch.ones(2, 5, 3, 4, 8)), {}, r"kv must be \(batch, seqlen, 2, heads"),
    ("flash_attn_varlen_func", (*QKV, ENDS, ENDS, 5, 5), {}, r"q must be \(total, heads, head_dim\)"),
    ("flash_attn_varlen_func", (*PACKED, ENDS, ENDS, 5, 5), {"block_table": torch.zeros(1, 1).int()}, "block_table"),
    ("flash_attn_varlen_func", (*PACKED, ENDS[:1], ENDS, 5, 5), {}, r"shape \(1,\), got \(2,\)"),
    ("flash_attn_varlen_kvpacked_func", (PACKED[0], PACKED[1], ENDS, ENDS, 5, 5), {}, r"kv must be \(total, 2, heads"),
    ("flash_attn_varlen_qkvpacked_func", (PACKED[0], ENDS, 5), {}, r"qkv must be \(total, 3, heads"),
]


@pytest.mark.parametrize(("name", "arguments", "options", "message"), REFUSED)
def test_mistakes_are_named(name, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(flash_attn, name)(*arguments, **options)
