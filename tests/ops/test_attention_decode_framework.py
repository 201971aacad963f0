"""attention_decode within PyTorch: autograd, inference mode, autocast, raw ops, and compiled."""

import pytest
import torch
from decode_cases import int32, normal, small_call, to

import fastattn
from fastattn.ops._backends import why_not_available

OP = "attention_decode"
NATIVE = why_not_available("native", "cpu")
needs_native = pytest.mark.skipif(NATIVE is not None, reason=f"no C++ kernels for the CPU: {NATIVE}")


def test_autograd_and_inference_mode_learn_of_the_append(backend, device):
    q, k_cache, v_cache = to(device, *small_call())
    new, lengths = k_cache[:, :, :1].clone(), int32(3, 4).to(device)
    before = k_cache._version, v_cache._version
    fastattn.attention_decode(q, k_cache, v_cache, cache_seqlens=lengths)
    assert (k_cache._version, v_cache._version) == before
    fastattn.attention_decode(q, k_cache, v_cache, k=new, v=new, cache_seqlens=lengths)
    assert k_cache._version > before[0]
    assert v_cache._version > before[1]
    with torch.inference_mode():
        ours = k_cache.clone(), v_cache.clone()
        fastattn.attention_decode(q, *ours, k=new, v=new, cache_seqlens=lengths)
        fastattn.attention_decode(q, k_cache, v_cache, k=new, v=new, cache_seqlens=lengths)
        assert ours[0].equal(k_cache)


def test_autocast_follows_the_cache():
    q, k_cache, v_cache = small_call(torch.bfloat16)
    with torch.autocast("cpu", torch.float16):
        out = fastattn.attention_decode(q.float(), k_cache, v_cache, cache_seqlens=int32(3, 4))
    assert out.equal(fastattn.attention_decode(q, k_cache, v_cache, cache_seqlens=int32(3, 4)))


def test_fp64_runs_on_the_reference_and_explain_says_so():
    q, k_cache, v_cache = small_call(torch.float64)
    assert fastattn.attention_decode(q, k_cache, v_cache, cache_seqlens=int32(3, 4)).dtype == torch.float64
    text = fastattn.explain("attention_decode", q, k_cache, v_cache, cache_seqlens=int32(3, 4))
    assert "reference: runs" in text
    assert "got torch.float64" in text or "not built" in text


def test_raw_ops_pass_opcheck(raw_backend, device):
    q, k_cache, v_cache = to(device, *small_call(capacity=20, head_dim=16))
    new, lengths = k_cache[:, :, :2].clone(), int32(3, 18).to(device)
    nothing = (None,) * 5
    raw = torch.ops.fastattn
    for arguments in ((q, k_cache, v_cache, lengths, *nothing, 0, -1, 0, 0.0, 0.25, 0),
                      (q.transpose(1, 2).contiguous().transpose(1, 2), k_cache, v_cache[..., :8], lengths, *nothing,
                       2, 4, 0, 2.0, 0.25, 3)):  # fmt: skip
        torch.library.opcheck(getattr(raw.attention_decode_fwd, raw_backend), arguments)
    torch.library.opcheck(
        getattr(raw.attention_decode_append, raw_backend), (k_cache, v_cache, new, new, lengths, None, None)
    )


@needs_native
def test_raw_ops_check_their_arguments():
    q, k_cache, v_cache = small_call()
    nothing = (None,) * 5

    def fwd(q=q, k=k_cache, v=v_cache, lengths=(3, 4), table=None):
        torch.ops.fastattn.attention_decode_fwd.native(
            q, k, v, int32(*lengths), table, *nothing[1:], 0, -1, 0, 0.0, 0.25, 0
        )

    for change in (
        {"q": q[0]}, {"q": q.half()}, {"k": k_cache[:, :1]}, {"lengths": (3, 25)}, {"lengths": (-1, 4)},
        {"lengths": (3,)}, {"table": int32(0, 9).view(2, 1)}, {"v": v_cache.transpose(2, 3)},
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            fwd(**change)
    with pytest.raises(RuntimeError):
        torch.ops.fastattn.attention_decode_append.native(
            k_cache, v_cache, k_cache[:, :, :1], v_cache[:, :, :1], int32(24, 0), None, None
        )


@needs_native
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    """The mutation is functionalised: caches and outputs of the compiled call are those of the eager call."""
    torch._dynamo.reset()

    def step(q, k_cache, v_cache, k, v, lengths):
        with fastattn.use_backend("native"):
            out, lse = fastattn.attention_decode(
                q * 2, k_cache, v_cache, k=k * 2, v=v, cache_seqlens=lengths, return_lse=True
            )
            again = fastattn.attention_decode(q, k_cache, v_cache, cache_seqlens=lengths + k.shape[2])
        return out, lse, again, k_cache.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for capacity in (24, 40):
        q, k_cache, v_cache = small_call(capacity=capacity)
        new, lengths = normal(2, 2, 2, 8, seed=9), int32(3, 17)
        caches = [(k_cache.clone(), v_cache.clone()) for _ in range(2)]
        got, expected = (
            f(q, *c, new, new + 1, lengths) for f, c in zip((compiled, step), caches, strict=True)
        )  # fmt: skip
        torch.testing.assert_close(got, expected)
        assert all(a.equal(b) for a, b in zip(*caches, strict=True))
        assert not caches[0][0].equal(k_cache)
