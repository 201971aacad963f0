"""patch_sdpa: our kernels serve torch's scaled_dot_product_attention, and some calls are left to torch."""

import pytest
import torch
import torch.nn.functional as F

import fastattn

TORCHS = F.scaled_dot_product_attention


def heads(seqlen=7, n_heads=4, dtype=torch.float32):
    t = torch.randn(2, n_heads, seqlen, 8, generator=torch.Generator().manual_seed(seqlen))
    return t.to(dtype).requires_grad_()


@pytest.fixture(autouse=True)
def torchs_function_is_put_back():
    yield
    assert F.scaled_dot_product_attention is TORCHS


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"attn_mask": torch.arange(9) < 5},
        {"attn_mask": torch.linspace(-1, 1, 63).view(7, 9)},
        {"scale": 0.3},
        {"enable_gqa": True},
    ],
    ids=str,
)
def test_values_and_gradients(options):
    q, k, v = heads(), *(heads(9, 2 if options.get("enable_gqa") else 4) for _ in range(2))
    if options.get("attn_mask") is not None:
        options = {**options, "attn_mask": options["attn_mask"].expand(7, 9)}
    expected = TORCHS(q, k, v, **options)
    with fastattn.patch_sdpa() as patch:
        found = F.scaled_dot_product_attention(q, k, v, **options)
    assert (patch.served, patch.left.total()) == (1, 0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(t.square().sum(), (q, k, v)) for t in (found, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_layers_of_torch_are_served():
    layer = torch.nn.MultiheadAttention(16, 4)
    x = torch.randn(5, 2, 16)
    expected, _ = layer(x, x, x, need_weights=False)
    patch = fastattn.patch_sdpa()
    found, _ = layer(x, x, x, need_weights=False)
    patch.undo()
    assert str(patch) == "1 call served by fastattn, 0 left to torch"
    torch.testing.assert_close(found, expected)


def test_what_is_left_to_torch_is_listed():
    nested = torch.nested.nested_tensor([torch.randn(3, 4, 8), torch.randn(5, 4, 8)], layout=torch.jagged)
    nested = nested.transpose(1, 2)
    with fastattn.patch_sdpa() as patch:
        for q, kind in ((heads(dtype=torch.float64), "float64"), (nested, "NestedTensor")):
            out = F.scaled_dot_product_attention(q, q, q)
            assert out.dtype == q.dtype
            assert any(kind in reason for reason in patch.left)
        with pytest.raises(RuntimeError):  # torch's own message
            F.scaled_dot_product_attention(heads(), heads(9).to(torch.bfloat16), heads(9))
        graph = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q), backend="eager", fullgraph=True)
        torch.testing.assert_close(graph(heads()), TORCHS(heads(), heads(), heads()))
    assert patch.served == 0
    assert len(patch.left) == 3
    assert "1 left to torch: " in str(patch)


def test_patches_are_undone_in_reverse_order():
    first, second = fastattn.patch_sdpa(), fastattn.patch_sdpa()
    with pytest.raises(RuntimeError, match="another function has taken the place"):
        first.undo()
    second.undo()
    first.undo()
    first.undo()


def test_an_exception_undoes_it():
    with pytest.raises(KeyError), fastattn.patch_sdpa():
        raise KeyError


@pytest.mark.skipif(not hasattr(torch.nn.attention, "list_flash_attention_impls"), reason="this torch has no registry")
def test_the_registry_of_torch():
    assert "fastattn" in torch.nn.attention.list_flash_attention_impls()
    torch.nn.attention.activate_flash_attention_impl("fastattn")
    assert torch.nn.attention.current_flash_attention_impl() == "fastattn"
    patched, q = F.scaled_dot_product_attention, heads()
    torch.nn.attention.restore_flash_attention_impl()
    assert patched is not TORCHS
    assert F.scaled_dot_product_attention is TORCHS
    torch.testing.assert_close(patched(q, q, q), TORCHS(q, q, q), atol=1e-5, rtol=1e-5)
