"""Conditions under which implementations of fused attention have been wrong, on every backend, one test for each.

Rows that see nothing, strides and offsets, and repeated runs against races are in the files of the backends.
"""

import pytest
import torch
from attention_cases import check, normal, on, qkv, results

import fastattn
from fastattn.ops.attention import _ops

OP = "attention"


@pytest.fixture
def deterministic_mode():
    """torch's global flag, under which uninitialised memory is full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_mask_and_key_tail_with_lse_far_below_minus_89(backend, device, monkeypatch):
    """A key tail that is not masked before the exponential has exp(0 - lse) = inf."""
    q, k, v = qkv(1, 1, 64, 192, 16)
    mask = torch.rand(1, 1, 64, 192, generator=torch.Generator().manual_seed(0)) > 0.5
    mask[..., 3, :] = False
    for seqlen_k in (192, 190):
        tail = {"mask": mask[..., :seqlen_k], "bias": torch.full((1, seqlen_k), -200.0)}
        check(monkeypatch, seqlen_k, q, k[:, :, :seqlen_k], v[:, :, :seqlen_k], **tail, backend=backend, device=device)


def test_fp32_mask_with_half_precision_queries(backend, device, monkeypatch):
    """nn.Transformer's causal mask is float32 by default."""
    q, k, v = qkv(2, 2, 40, 40, 16, torch.float16)
    bias = torch.nn.Transformer.generate_square_subsequent_mask(40)
    check(monkeypatch, "causal mask", q, k, v, bias=bias, backend=backend, device=device)


@pytest.mark.parametrize("seqlen_k", [1, 70])
def test_backward_of_one_query(seqlen_k, backend, device, monkeypatch):
    q, k, v = qkv(2, 2, 1, seqlen_k, 16, kv_heads=1)
    check(monkeypatch, seqlen_k, q, k, v, causal=True, backend=backend, device=device)


GROUPED = [
    (1, 6, 33, 65, 16, torch.float32, 2),
    (2, 4, 17, 64, 8, torch.float16, 1),
    (1, 4, 64, 20, 40, torch.float32, 2),
]


@pytest.mark.parametrize("shape", GROUPED)
def test_grouped_heads_forward_and_backward(shape, backend, device, monkeypatch):
    check(monkeypatch, shape, *qkv(*shape), causal=True, backend=backend, device=device)


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "sink"])
def test_only_one_input_requires_grad(name, backend, device):
    tensors = on(device, *qkv(1, 2, 20, 30, 16), normal(20, 30, seed=4), normal(2))

    def call():
        q, k, v, bias, sink = tensors
        return results(q, k, v, {"bias": bias, "sink": sink}, backend)

    expected = call()
    for label, t in zip(("q", "k", "v", "bias", "sink"), tensors, strict=True):
        t.requires_grad_(label == name)
    got = call()
    assert set(got) == {"out", "lse", "d" + name}
    torch.testing.assert_close(got["d" + name], expected["d" + name])


@pytest.mark.usefixtures("deterministic_mode")
def test_later_packed_sequences_in_memory_full_of_nan(backend, device, monkeypatch):
    assert torch.empty(8).isnan().all()
    ends = [torch.tensor([0, *lens]).cumsum(0).int() for lens in ([33, 0, 70, 5], [20, 7, 66, 1])]
    q, k, v = (normal(n, 2, 16, seed=seed) for seed, n in enumerate((108, 94, 94)))
    for t in (q, k, v):  # C++ allocates without the flag: it gets freed memory with its old content
        [torch.full_like(t, torch.nan) for _ in range(16)]
    check(
        monkeypatch,
        "packed",
        q,
        k,
        v,
        cu_seqlens_q=ends[0],
        cu_seqlens_k=ends[1],
        causal=True,
        backend=backend,
        device=device,
    )


@pytest.mark.usefixtures("deterministic_mode")
def test_deterministic_flag_at_head_dim_256(backend, device, interpreted):
    q, k, v = on(device, *qkv(1, 2, 70, 70, 256, kv_heads=1))
    kwargs = {"causal": True, "dropout_p": 0.1}
    first = results(q, k, v, kwargs, backend)
    for repeat in range(1 if interpreted or backend == "reference" else 20):
        again = results(q, k, v, kwargs, backend)
        assert all(again[name].equal(value) for name, value in first.items()), f"repeat {repeat}"


@pytest.mark.parametrize("causal", [False, True])
def test_key_lengths_reach_the_backward(causal, backend, device):
    """Gradients are those of each sequence alone, cut at its length; keys after it get none."""
    lengths = [0, 33, 70]
    q, k, v, seqlens_k = on(device, *qkv(3, 2, 20, 70, 16), torch.tensor(lengths).int())
    got = results(q, k, v, {"seqlens_k": seqlens_k, "causal": causal}, backend, use_lse=False)
    cotangent = torch.randn(3, 2, 20, 16, generator=torch.Generator().manual_seed(1)).to(device)
    for b, length in enumerate(lengths):
        alone = [t.detach()[b, None].requires_grad_() for t in (q, k[:, :, :length], v[:, :, :length])]
        out = fastattn.attention(*alone, causal=causal, backend="reference")
        torch.testing.assert_close(got["out"][b, None], out.detach(), atol=1e-6, rtol=1e-5)
        for name, grad in zip("qkv", torch.autograd.grad(out, alone, cotangent[b, None]), strict=True):
            torch.testing.assert_close(got["d" + name][b, None, :, : grad.shape[2]], grad, atol=1e-5, rtol=1e-5)
            assert name == "q" or not got["d" + name][b, :, length:].any()


@pytest.mark.parametrize("causal", ["top_left", "bottom_right"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(70, 40), (40, 70)])
def test_causal_of_unequal_lengths(seqlen_q, seqlen_k, causal, backend, device, monkeypatch):
    check(monkeypatch, causal, *qkv(1, 1, seqlen_q, seqlen_k, 16), causal=causal, backend=backend, device=device)


@pytest.mark.skipif(fastattn.backends()["cpu"]["native"] != "available", reason="the native backend is not built")
def test_grouped_heads_with_a_mask_stay_on_the_kernels(monkeypatch):
    """Nothing is expanded on the way, and `explain` says what runs."""
    q, k, v = (t.detach() for t in qkv(2, 4, 5, 7, 8, kv_heads=2))
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    assert "native: runs" in fastattn.explain("attention", q, k, v, mask=mask)
    seen, raw = [], _ops["fwd"]["native"]
    monkeypatch.setitem(_ops["fwd"].direct, "native", lambda *args: seen.extend(args) or raw(*args))
    fastattn.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    for got, given in ((seen[0], q), (seen[1], k), (seen[2], v), (seen[5], mask)):
        assert (got.data_ptr(), got.shape, got.stride()) == (given.data_ptr(), given.shape, given.stride())
