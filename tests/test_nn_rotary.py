"""RotaryEmbedding: its tables, their growth and their dtype, and what it makes of q and k."""

import pytest
import torch

import fastattn
from fastattn.nn import RotaryEmbedding


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact_tables(rows, rotary_dim, base=10000.0):
    angle = torch.outer(torch.arange(rows).double(), base ** (-torch.arange(0, rotary_dim, 2).double() / rotary_dim))
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("base", [10000.0, 5e5])
def test_tables_are_exact_to_fp32(base):
    rotary = RotaryEmbedding(64, max_seqlen=100_000, base=base)
    for table, exact in zip((rotary.cos, rotary.sin), exact_tables(100_000, 64, base), strict=True):
        assert table.dtype == torch.float32
        assert (table - exact).abs().max() <= 2**-24


@pytest.mark.parametrize("interleaved", [False, True])
def test_is_the_op_on_its_tables(interleaved):
    rotary = RotaryEmbedding(12, max_seqlen=20, interleaved=interleaved)
    q, k = randn(2, 4, 7, 16), randn(2, 1, 7, 16, seed=1)
    for positions in (None, 5, torch.arange(7).flip(0), torch.tensor([[3], [11]]) + torch.arange(7)):
        want = fastattn.rotary_embedding((q, k), rotary.cos, rotary.sin, positions=positions, interleaved=interleaved)
        got = rotary(q, k, positions=positions)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.equal(rotary(q, positions=positions), want[0])
    packed = q[0].transpose(0, 1)
    assert torch.equal(rotary(packed), rotary(q[:1])[0].transpose(0, 1))
    copy = q.clone()
    assert rotary(copy, inplace=True) is copy
    assert torch.equal(copy, rotary(q))


def test_tables_grow():
    rotary = RotaryEmbedding(8, max_seqlen=4)
    large = RotaryEmbedding(8, max_seqlen=100)
    for seqlen, positions in ((4, None), (5, None), (3, 40), (1, 60)):
        x = randn(1, 2, seqlen, 8)
        assert torch.equal(rotary(x, positions=positions), large(x, positions=positions))
    assert rotary.cos.shape == (86, 4)  # 4, 8, 43, twice that
    assert torch.equal(rotary(randn(86, 2, 8)), large(randn(86, 2, 8)))
    with pytest.raises(ValueError, match="within the 86 rows of cos, got 86 to 86"):
        rotary(randn(1, 2, 1, 8), positions=torch.tensor([86]))


def test_casts_keep_the_tables():
    exact = RotaryEmbedding(32).cos
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), RotaryEmbedding(32))
    for cast in (torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double, lambda m: m.to(torch.float16)):
        cast(model)
        assert torch.equal(model[1].cos, exact)
        assert model[1].cos.dtype == torch.float32
    x = randn(1, 2, 4, 32).bfloat16()
    assert model[1](x).dtype == torch.bfloat16


def test_is_not_in_the_state_dict_and_survives_meta():
    with torch.device("meta"):
        rotary = RotaryEmbedding(16, max_seqlen=9)
    assert rotary.cos.is_meta
    assert not rotary.state_dict()
    assert torch.equal(rotary.to_empty(device="cpu").cos, RotaryEmbedding(16, max_seqlen=9).cos)


def test_repr():
    assert repr(RotaryEmbedding(8, max_seqlen=3)) == "RotaryEmbedding(8, max_seqlen=3, base=10000.0, interleaved=False)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rotary_dim": 7}, "rotary_dim must be even and at least 2, got 7"),
        ({"rotary_dim": 0}, "rotary_dim must be even and at least 2, got 0"),
        ({"rotary_dim": 8, "max_seqlen": 0}, "max_seqlen must be at least 1, got 0"),
        ({"rotary_dim": 8, "base": 0.0}, "base must be above 0, got 0.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"RotaryEmbedding: {message}"):
        RotaryEmbedding(**arguments)


def test_compile_without_a_graph_break():
    torch._dynamo.reset()
    rotary = RotaryEmbedding(8, max_seqlen=16)
    compiled = torch.compile(rotary, backend="aot_eager", fullgraph=True, dynamic=True)
    for seqlen in (3, 9, 16):
        q, k = randn(2, 4, seqlen, 8).requires_grad_(), randn(2, 2, seqlen, 8, seed=1)
        torch.testing.assert_close(compiled(q, k), rotary(q, k))


@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_narrower_than_rotary_dim_are_refused(interleaved):
    """Tables twice as wide as they should be look like doubled ones, and would rotate by wrong angles."""
    rotary = RotaryEmbedding(16, max_seqlen=8, interleaved=interleaved)
    with pytest.raises(ValueError, match="RotaryEmbedding: head_dim must be at least rotary_dim 16, got 8"):
        rotary(torch.randn(1, 2, 4, 8))
