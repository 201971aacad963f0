"""Code that is replaced for all modules of a class, or for all callers of a function, takes effect in a layer."""

import layer_pairs
import pytest
import torch
from layer_pairs import LAYERS, assert_same, build

import fastattn.nn.decoder
import fastattn.nn.encoder
import fastattn.nn.sublayers
from fastattn import nn

fused = layer_pairs.fused  # a fixture


def test_classes_in_the_place_of_those_of_torch_stay_fused(monkeypatch):
    """torch.nn.TransformerEncoder = fastattn.nn.TransformerEncoder etc. does not count as a patch of torch.nn."""
    torch.manual_seed(0)
    x, calls, op = torch.randn(2, 5, 8), [], fastattn.nn.sublayers.layer_norm
    model = nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True)
    for module, name in ((fastattn.nn.encoder, "encode"), (fastattn.nn.decoder, "decode")):
        monkeypatch.setattr(module, name, lambda *_: None)  # the parts, not the one call of a layer
    expected = model(x, x)
    for name in ("LayerNorm", "RMSNorm", "MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer",
                 "TransformerEncoder", "TransformerDecoder", "Transformer"):  # fmt: skip
        monkeypatch.setattr(torch.nn, name, getattr(nn, name))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fastattn.scaled_dot_product_attention)
    for module in (fastattn.nn.encoder, fastattn.nn.decoder, fastattn.nn.sublayers):
        if hasattr(module, "layer_norm"):
            monkeypatch.setattr(
                module, "layer_norm", lambda *args, **kwargs: calls.append(kwargs) or op(*args, **kwargs)
            )
    assert torch.equal(model(x, x), expected)
    assert sum("residual" in kwargs for kwargs in calls) == 5  # every norm of a sub-layer also adds the residual
    made = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
    calls.clear()
    made(x)
    assert len(calls) == 4


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("path", ["LayerNorm", "MultiheadAttention"])
def test_a_forward_of_our_classes_is_called(name, path, monkeypatch, fused):
    ours, _, x = build(name)
    seen, forward = [], getattr(nn, path).forward

    def noting(self, *args, **kwargs):
        seen.append(type(self).__name__)
        return forward(self, *args, **kwargs)

    expected = ours(*x)
    del fused[:]
    monkeypatch.setattr(getattr(nn, path), "forward", noting)
    torch.testing.assert_close(ours(*x), expected)
    assert len(seen) == sum(type(module).__name__ == path for module in ours.modules())
    assert not fused
    monkeypatch.undo()


@pytest.mark.parametrize("name", LAYERS)
def test_our_attention_in_the_place_of_torchs_leaves_layers_fused(name, monkeypatch, fused):
    ours, theirs, x = build(name)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fastattn.scaled_dot_product_attention)
    assert_same(ours, theirs, x)
    assert fused


def test_a_causal_hint_needs_no_mask_where_attention_is_replaced(monkeypatch):
    ours, _, (x,) = build("TransformerEncoderLayer")
    expected, original = ours(x, is_causal=True), torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kwargs: original(*args, **kwargs)
    )
    torch.testing.assert_close(ours(x, is_causal=True), expected)


def test_a_patched_activation_module_is_called(monkeypatch):
    ours, theirs, x = build("TransformerEncoderLayer", activation=torch.nn.GELU())
    monkeypatch.setattr(torch.nn.GELU, "forward", lambda self, x: x.sin())
    assert_same(ours, theirs, x)
