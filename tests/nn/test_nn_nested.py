"""Layers on nested tensors: each sequence gets the result that it gets alone, gradients included."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nested_cases import LAYOUTS, LENGTHS, assert_alike, compiled, nest, parts_of, sequences

import fastattn
from fastattn import nn


@pytest.fixture(params=LAYOUTS, ids=str)
def layout(request):
    return request.param


class TestLayers:
    def make(self, kind, **options):
        torch.manual_seed(0)
        return getattr(nn, kind)(16, 2, 32, dropout=0.0, batch_first=True, **options)

    def assert_each_alone(self, layer, call, parts, layout):
        """A layer gives each sequence the result that it has alone, and its parameters the sum of the gradients."""
        x = [nest(p, layout, requires_grad=layout is torch.jagged) for p in parts]
        out = call(layer, *x)
        twin = copy.deepcopy(layer)
        right = [call(twin, *(t[None] for t in one))[0] for one in zip(*parts, strict=True)]
        assert_alike(out, right, rtol=1e-4, atol=1e-5)
        if layout is torch.jagged:
            sum((t * t).sum() for t in out.unbind()).backward()
            sum((t * t).sum() for t in right).backward()
            for p, other in zip(layer.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(p.grad, other.grad, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("norm_first", [False, True])
    @pytest.mark.parametrize("is_causal", [False, True])
    def test_encoder_layer(self, norm_first, training, is_causal, layout):
        layer = self.make("TransformerEncoderLayer", norm_first=norm_first).train(training)
        parts = sequences((4, 1, 2), 16)
        if training and layout is torch.strided:
            with pytest.raises(
                AssertionError, match="does not support NestedTensor outside of its fast path: training"
            ):
                layer(nest(parts, layout))
            return
        self.assert_each_alone(layer, lambda m, x: m(x, is_causal=is_causal), (parts,), layout)

    def test_hooked_layer(self):
        """With a hook the children are called, with jagged tensors."""
        layer = self.make("TransformerEncoderLayer")
        seen = []
        layer.linear1.register_forward_hook(lambda m, args, out: seen.append(args[0].is_nested))
        self.assert_each_alone(layer, lambda m, x: m(x), (sequences((4, 1, 2), 16),), torch.jagged)
        assert any(seen)

    def test_decoder_layer_and_stacks(self):
        parts, memory = sequences((4, 1, 2), 16), sequences((3, 5, 1), 16, seed=1)
        layer = self.make("TransformerDecoderLayer")
        self.assert_each_alone(layer, lambda m, x, y: m(x, y, tgt_is_causal=True), (parts, memory), torch.jagged)
        stack = nn.TransformerDecoder(self.make("TransformerDecoderLayer"), 2, nn.LayerNorm(16))
        self.assert_each_alone(stack, lambda m, x, y: m(x, y), (parts, memory), torch.jagged)
        stack = nn.TransformerEncoder(self.make("TransformerEncoderLayer"), 2, nn.RMSNorm(16))
        self.assert_each_alone(stack, lambda m, x: m(x), (parts,), torch.jagged)

    def test_transformer_and_compiled(self):
        parts, others = sequences((4, 1, 2), 16), sequences((3, 5, 1), 16, seed=1)
        model = nn.Transformer(16, 2, 1, 1, 32, 0.0, batch_first=True)
        self.assert_each_alone(model, lambda m, x, y: m(x, y), (parts, others), torch.jagged)
        x = nest(parts, torch.jagged)
        layer = self.make("TransformerEncoderLayer")
        assert_alike(compiled(layer, x), parts_of(layer(x)), rtol=1e-4, atol=1e-5)

    def test_attention_between_sequences(self):
        layer = nn.MultiheadAttention(16, 2, batch_first=True, kdim=8, vdim=8)
        parts, others = sequences((4, 1, 2), 16), sequences((3, 5, 1), 8, seed=1)
        self.assert_each_alone(
            layer, lambda m, q, k: m(q, k, k, need_weights=False)[0], (parts, others), torch.jagged
        )  # fmt: skip

    @pytest.mark.parametrize("average", [False, True])
    def test_weights(self, average, layout):
        """They are padded, with 0 where there is no token, like those of torch's fast path."""
        torch.manual_seed(0)
        layer = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
        ours = copy.deepcopy(layer)
        fastattn.replace(ours)
        parts = sequences((4, 1, 2), 16)
        x, strided = nest(parts, layout), nest(parts, torch.strided)
        with torch.no_grad():
            out, weights = ours(x, x, x, average_attn_weights=average)
            right, wanted = layer(strided, strided, strided, average_attn_weights=average)
        assert_alike(out, right.unbind(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights, wanted, rtol=1e-4, atol=1e-5)
        ours.train()
        if layout is torch.jagged:
            ours.dropout = 0.5
            torch.manual_seed(1)
            out, weights = ours(x, x, x, average_attn_weights=False)
            value = [F.linear(p, ours.in_proj_weight[32:], ours.in_proj_bias[32:]).unflatten(1, (2, 8)) for p in parts]
            for b, part in enumerate(out.unbind()):
                n = len(part)
                made = (weights[b, :, :n, :n] @ value[b].transpose(0, 1)).transpose(0, 1).flatten(1)
                torch.testing.assert_close(part, ours.out_proj(made), rtol=1e-4, atol=1e-5)

    def test_feed_forward_and_norms(self, layout):
        parts = sequences(LENGTHS, 8)
        for layer in (nn.FeedForward(8, 16), nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False), nn.RMSNorm(8)):
            assert_alike(layer(nest(parts, layout)), [layer(p) for p in parts])

    def test_what_is_refused_is_named(self, layout):
        layer = self.make("TransformerEncoderLayer").eval()
        attention = layer.self_attn
        x, other = nest(sequences((4, 2), 16), layout), nest(sequences((3, 5), 16), layout)
        padding = torch.zeros(2, 4, dtype=torch.bool)
        outside = "MultiheadAttention does not support NestedTensor outside of its fast path: "
        for message, call in (
            ("the tensors must have 3 dimensions, got 1", lambda: layer(torch.nested.nested_tensor([]))),
            ("a mask was given", lambda: layer(x, src_key_padding_mask=padding)),
            ("a mask was given", lambda: attention(x, x, x, attn_mask=torch.zeros(4, 4))),
            ("query, key and value are not nested tensors of one layout",
             lambda: attention(x, torch.randn(2, 4, 16), torch.randn(2, 4, 16))),
            ("it needs batch_first", lambda: nn.MultiheadAttention(16, 2).eval()(x, x, x)),
            ("it needs batch_first, and neither add_bias_kv nor add_zero_attn",
             lambda: nn.MultiheadAttention(16, 2, batch_first=True, add_zero_attn=True).eval()(x, x, x)),
        ):  # fmt: skip
            with pytest.raises(AssertionError, match=outside + message):
                call()
        if layout is torch.jagged:
            with pytest.raises(AssertionError, match="key and value must have sequences of the same lengths"):
                attention(x, x, other, need_weights=False)
        else:
            with pytest.raises(AssertionError, match=outside + "query, key and value are not the same strided"):
                attention(x, other, other, need_weights=False)
