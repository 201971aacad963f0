"""The deliberate differences from torch.nn, one class per row of docs/torch-nn.md."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from nn_oracle import pair, slow_path
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
import fastattn.nn.attention
import fastattn.nn.masks
from fastattn import nn

E, H, FF, N, L = 16, 4, 24, 3, 6


def causal_mask(length=L, dtype=torch.float32):
    return torch.nn.Transformer.generate_square_subsequent_mask(length, dtype=dtype)


def lengths_mask(*lengths):
    return torch.arange(L) >= torch.tensor(lengths)[:, None]


@pytest.fixture
def x():
    return torch.randn(N, L, E, generator=torch.Generator().manual_seed(0))


class TestFloatMaskIsAdded:
    def test_in_evaluation_too(self, x):
        ours, theirs = pair("TransformerEncoderLayer", E, H, FF, batch_first=True)
        ours.eval(), theirs.eval()
        mask = torch.randn(L, L)
        with slow_path(), torch.no_grad():
            expected = theirs(x, mask)
        with torch.no_grad():
            torch.testing.assert_close(ours(x, mask), expected)


class TestCausalHint:
    def test_without_a_mask(self, x):
        ours, theirs = pair("MultiheadAttention", E, H, batch_first=True)
        for need_weights in (True, False):
            got = ours(x, x, x, need_weights=need_weights, is_causal=True)
            with slow_path():
                expected = theirs(x, x, x, need_weights=need_weights, attn_mask=causal_mask())
                with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
                    theirs(x, x, x, is_causal=True)
            torch.testing.assert_close(got, expected)

    def test_is_top_left_for_unequal_lengths(self, x):
        ours, theirs = pair("MultiheadAttention", E, H, batch_first=True)
        for queries in (x[:, :4], torch.cat((x, x), 1)):
            mask = torch.ones(queries.shape[1], L, dtype=torch.bool).triu(1)
            torch.testing.assert_close(ours(queries, x, x, is_causal=True)[0], theirs(queries, x, x, attn_mask=mask)[0])

    @pytest.mark.parametrize("need_weights", [False, True])
    @pytest.mark.parametrize("padded", [False, True])
    def test_is_trusted_on_every_path_and_joined_with_padding(self, x, padded, need_weights):
        """With a hint the mask is not read, whatever it holds, and it may even be larger."""
        ours, theirs = pair("MultiheadAttention", E, H, batch_first=True)
        padding = lengths_mask(6, 4, 2) if padded else None
        got = ours(x, x, x, padding, need_weights, torch.zeros(9, 9), is_causal=True)[0]
        causal = torch.ones(L, L, dtype=torch.bool).triu(1)
        torch.testing.assert_close(got, theirs(x, x, x, padding, True, causal)[0])

    def test_appended_keys_stay_visible(self, x):
        ours, theirs = pair("MultiheadAttention", E, H, add_bias_kv=True, add_zero_attn=True, batch_first=True)
        got = ours(x, x, x, is_causal=True, average_attn_weights=False)
        expected = theirs(x, x, x, attn_mask=causal_mask(), average_attn_weights=False)
        torch.testing.assert_close(got, expected)
        assert (got[1][..., -2:] > 0).all()

    def test_strict(self, x):
        strict, theirs = pair("MultiheadAttention", E, H, batch_first=True)
        strict.strict_torch = True
        with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
            strict(x, x, x, need_weights=False, is_causal=True)
        mask, padding = torch.randn(L, L), lengths_mask(6, 4, 2).float()
        for pad, need_weights in ((None, False), (padding, False), (None, True)):
            arguments = (x, x, x, pad, need_weights, mask)
            with slow_path():
                torch.testing.assert_close(strict(*arguments, is_causal=True)[0], theirs(*arguments, is_causal=True)[0])


class TestFullyMaskedRows:
    @pytest.mark.parametrize("kind", ["bool", "float"])
    @pytest.mark.parametrize("need_weights", [False, True])
    def test_give_zero_and_finite_gradients(self, x, need_weights, kind):
        module = nn.MultiheadAttention(E, H, batch_first=True)
        torch.nn.init.normal_(module.out_proj.bias)
        padding = lengths_mask(6, 0, 2)
        mask = torch.ones(L, L, dtype=torch.bool).triu(1)
        mask[2] = True
        if kind == "float":
            padding, mask = (torch.zeros(m.shape).masked_fill(m, float("-inf")) for m in (padding, mask))
        leaf = x.clone().requires_grad_()
        out, weights = module(leaf, leaf, leaf, padding, need_weights, mask)
        for dead in (out[1], out[:, 2]):
            torch.testing.assert_close(dead, module.out_proj.bias.expand_as(dead))
        if need_weights:
            assert not weights[1].any()
            assert not weights[:, 2].any()
            torch.testing.assert_close(weights[0, 3].sum(), torch.tensor(1.0))
        out.sum().backward()
        assert all(p.grad.isfinite().all() for p in module.parameters())
        assert leaf.grad.isfinite().all()

    def test_whole_layer_stays_finite(self, x):
        layer = nn.TransformerEncoderLayer(E, H, FF, batch_first=True)
        for module in (layer, layer.eval()):
            out = module(x, src_key_padding_mask=lengths_mask(0, 0, 3))
            out.sum().backward()
            assert out.isfinite().all()
            assert all(p.grad.isfinite().all() for p in layer.parameters())

    def test_torch_gives_nan(self, x):
        strict, theirs = pair("MultiheadAttention", E, H, batch_first=True)
        strict.strict_torch = True
        for module in (theirs, strict):
            assert module(x, x, x, lengths_mask(6, 0, 2))[0][1].isnan().all()


class TestPaddedRows:
    @pytest.mark.parametrize("ours", [True, False])
    def test_stay_finite(self, x, ours):
        """Our stack keeps values there; torch's sets them to zero before the final norm."""
        layer = nn.TransformerEncoderLayer(E, H, FF, batch_first=True).eval()
        stack = (nn if ours else torch.nn).TransformerEncoder(layer, 2, nn.LayerNorm(E)).eval()
        padding = lengths_mask(6, 4, 2)
        with torch.no_grad():
            out = stack(x, src_key_padding_mask=padding)
            whole = torch.stack([stack(s[None, :n])[0, -1] for s, n in zip(x, (6, 4, 2), strict=True)])
        assert out.isfinite().all()
        torch.testing.assert_close(out[torch.arange(N), [5, 3, 1]], whole)
        assert (out[padding] == 0).all() == (not ours)  # the norm of a zero row is its bias, 0 here


class TestGelu:
    def test_is_the_one_that_was_asked_for(self, x):
        for approximate in ("none", "tanh"):
            layer = nn.TransformerEncoderLayer(E, H, FF, 0.0, torch.nn.GELU(approximate), batch_first=True).eval()
            h = layer.norm1(x + layer.self_attn(x, x, x)[0])
            hidden = F.gelu(layer.linear1(h), approximate=approximate)
            with torch.no_grad():
                torch.testing.assert_close(layer(x), layer.norm2(h + layer.linear2(hidden)), rtol=0, atol=2e-6)


class TestOutProjection:
    def test_is_called_as_a_module(self, x):
        module = nn.MultiheadAttention(E, H, batch_first=True)
        called = []
        module.out_proj.register_forward_hook(lambda *args: called.append(True))
        module(x, x, x)
        assert called


class TestCausalityDetection:
    def test_compared_in_every_call(self, x):
        layer = nn.TransformerEncoderLayer(E, H, FF, 0.0, batch_first=True)
        stack, mask = nn.TransformerEncoder(layer, 2), causal_mask()
        causal = stack(x, mask)
        torch.testing.assert_close(causal, stack(x, is_causal=True), rtol=0, atol=0)
        mask.data = torch.zeros(L, L)
        torch.testing.assert_close(stack(x, mask), stack(x))

    @pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
    def test_result_is_the_same_either_way(self, x, dtype):
        stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, FF, 0.0, batch_first=True), 1)
        mask = torch.ones(L, L).triu(1).bool() if dtype == torch.bool else causal_mask()
        assert fastattn.nn.masks.is_causal_mask(mask, None, L)
        torch.testing.assert_close(stack(x, mask), stack(x, mask, is_causal=False))
        decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, FF, 0.0, batch_first=True), 1)
        torch.testing.assert_close(decoder(x, x, mask), decoder(x, x, mask, tgt_is_causal=False))

    def test_what_is_not_read(self):
        detect = fastattn.nn.masks.is_causal_mask
        assert not detect(causal_mask().requires_grad_(), None, L)  # otherwise its gradient would be lost
        assert not detect(causal_mask(), None, L + 1)
        assert not detect(torch.zeros(L, L), None, L)
        assert not detect(None, None, L)
        assert detect(None, True, L)
        with torch.inference_mode():
            assert detect(causal_mask(), None, L)


class TestMixedMasks:
    def test_kinds_mix_without_a_warning(self, x):
        ours, theirs = pair("MultiheadAttention", E, H, batch_first=True)
        padding = lengths_mask(6, 4, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = ours(x, x, x, padding, attn_mask=causal_mask())
        with pytest.warns(UserWarning, match="mismatched"):
            expected = theirs(x, x, x, padding, attn_mask=causal_mask())
        torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize("need_weights", [False, True])
    def test_fp32_mask_with_half_query(self, x, need_weights):
        ours, theirs = pair("MultiheadAttention", E, H, batch_first=True)
        ours.bfloat16()
        half, mask = x.bfloat16(), torch.randn(L, L) * 3
        got = ours(half, half, half, None, need_weights, mask)
        expected = theirs(x, x, x, None, need_weights, mask)
        assert got[0].dtype == torch.bfloat16
        torch.testing.assert_close(got[0].float(), expected[0], rtol=0.05, atol=0.05)
        if need_weights:
            torch.testing.assert_close(got[1].float(), expected[1], rtol=0.05, atol=0.02)

    @pytest.mark.parametrize("need_weights", [False, True])
    def test_fp64_mask_raises(self, x, need_weights):
        for module in pair("MultiheadAttention", E, H, batch_first=True):
            with slow_path(), pytest.raises(RuntimeError, match="dtype"):
                module(x, x, x, None, need_weights, torch.zeros(L, L, dtype=torch.float64))

    def test_strict_warns(self, x):
        module = nn.MultiheadAttention(E, H, batch_first=True, strict_torch=True)
        with pytest.warns(UserWarning, match="mismatched"):
            module(x, x, x, lengths_mask(6, 4, 2), attn_mask=causal_mask())


class TestNestedTensors:
    def test_accepted_without_warning_or_conversion(self, x):
        layer = nn.TransformerEncoderLayer(E, H, FF)  # not batch_first: torch warns
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            stack = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True)
            nn.Transformer(E, H, 1, 1, FF)
        assert (stack.enable_nested_tensor, stack.use_nested_tensor) == (True, False)

    def test_strict_warns_and_converts(self, x):
        with pytest.warns(UserWarning, match="use_nested_tensor is False"):
            nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, FF), 1, strict_torch=True)
        layer = nn.TransformerEncoderLayer(E, H, FF, batch_first=True)
        stack = nn.TransformerEncoder(layer, 1, strict_torch=True).eval()
        with torch.no_grad():
            out = stack(x, src_key_padding_mask=lengths_mask(6, 4, 2))
        assert (out[lengths_mask(6, 4, 2)] == 0).all()

    @pytest.mark.parametrize("hooked", [False, True])
    @pytest.mark.parametrize("norm_first", [False, True])
    def test_what_the_container_of_torch_hands_over(self, x, norm_first, hooked):
        layer = nn.TransformerEncoderLayer(E, H, FF, batch_first=True, norm_first=norm_first).eval()
        if hooked:
            layer.linear2.register_forward_hook(lambda module, args, output: output * 1.5)
        sequences = [s[:n] for s, n in zip(x, (6, 1, 3), strict=True)]
        with torch.no_grad():
            outputs = layer(torch.nested.nested_tensor(sequences)).unbind()
            for output, sequence in zip(outputs, sequences, strict=True):
                torch.testing.assert_close(output, layer(sequence))

    def test_what_is_refused(self, x):
        sequences = [s[:n] for s, n in zip(x, (6, 1, 3), strict=True)]
        nested, jagged = (torch.nested.nested_tensor(sequences, layout=o) for o in (torch.strided, torch.jagged))
        module = nn.MultiheadAttention(E, H, batch_first=True).eval()
        out = module(nested, nested, nested, need_weights=False)[0]
        torch.testing.assert_close(out.unbind()[2], module(*sequences[2:] * 3, need_weights=False)[0])
        for t in (nested, jagged):
            with pytest.raises(AssertionError, match="does not support NestedTensor outside of its fast path: a mask"):
                module(t, t, t, need_weights=False, attn_mask=torch.zeros(6, 6))
        with pytest.raises(AssertionError, match="training is enabled"):
            module.train()(nested, nested, nested, need_weights=False)


class TestStrictInLayers:
    def test_reaches_every_attention(self):
        model = nn.Transformer(E, H, 1, 1, FF, batch_first=True, strict_torch=True)
        attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
        assert len(attentions) == 3
        assert all(m.strict_torch for m in (*attentions, model.encoder, model.decoder))
        x = torch.randn(2, 3, E)
        with pytest.raises(RuntimeError, match="Need attn_mask"):
            model.encoder.layers[0](x, is_causal=True)
        assert not any(getattr(m, "strict_torch", False) for m in nn.Transformer(E, H, 1, 1, FF).modules())

    @pytest.mark.filterwarnings("ignore:Support for mismatched")
    def test_follows_torch(self):
        ours, theirs = pair("Transformer", E, H, 1, 1, FF, 0.0)
        strict = nn.Transformer(E, H, 1, 1, FF, 0.0, strict_torch=True)
        strict.load_state_dict(ours.state_dict())
        src, tgt = torch.randn(5, 2, E), torch.randn(L, 2, E)
        with slow_path():
            for hint in (None, True, False):
                arguments = {"tgt_mask": causal_mask(), "tgt_is_causal": hint}
                torch.testing.assert_close(strict(src, tgt, **arguments), theirs(src, tgt, **arguments))


class TestFastPath:
    def test_private_functions_of_torch_are_never_called(self, x, monkeypatch):
        """torch's classes call them in evaluation. Its switch for the fast path changes nothing here."""
        stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, FF, batch_first=True), 2).eval()
        attn = nn.MultiheadAttention(E, H, batch_first=True).eval()
        expected = stack(x), attn(x, x, x)[0]

        def fail(*args, **kwargs):
            raise AssertionError("called")

        monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", fail)
        monkeypatch.setattr(torch, "_native_multi_head_attention", fail)
        for enabled in (True, False):
            torch.backends.mha.set_fastpath_enabled(enabled)
            try:
                with torch.no_grad():
                    got = stack(x), attn(x, x, x)[0]
            finally:
                torch.backends.mha.set_fastpath_enabled(True)
            for ours, before in zip(got, expected, strict=True):
                torch.testing.assert_close(ours, before)


class TestEmptyInputs:
    """No difference: torch accepts them too, except an empty mask of three dimensions."""

    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
    def test_are_served(self, batch, queries, keys, batch_first):
        attn = nn.MultiheadAttention(E, H, batch_first=batch_first)
        q, k = torch.randn(batch, queries, E), torch.randn(batch, keys, E)
        if not batch_first:
            q, k = q.transpose(0, 1), k.transpose(0, 1)
        out, weights = attn(q, k, k)
        assert out.shape == q.shape
        assert weights.shape == (batch, queries, keys)
        torch.testing.assert_close(out, attn.out_proj(torch.zeros_like(q)) if not keys else out)
        out.sum().backward()


class TestMixedDtypes:
    def test_norms_take_weights_of_another_dtype(self, x):
        """The result is computed in the wider of both dtypes and rounded to the dtype of the input."""
        for name in ("LayerNorm", "RMSNorm"):
            norm = getattr(nn, name)(E)
            torch.nn.init.normal_(norm.weight)
            exact = getattr(torch.nn, name)(E).double()
            exact.load_state_dict(norm.state_dict())
            for dtype in (torch.float64, torch.bfloat16):
                got = norm(x.to(dtype))
                assert got.dtype == dtype
                torch.testing.assert_close(got, exact(x.to(dtype).double()).to(dtype))
        with pytest.raises(RuntimeError, match="mixed dtype"):
            torch.nn.LayerNorm(E)(x.double())

    @pytest.mark.parametrize("batch_first", [False, True])
    def test_a_bias_of_another_dtype_than_its_weight_is_refused(self, x, batch_first):
        ours, theirs = pair("MultiheadAttention", E, H, batch_first=batch_first)
        for module in (ours, theirs):
            module.in_proj_bias = torch.nn.Parameter(module.in_proj_bias.half())
        with pytest.raises(RuntimeError, match="must have the same dtype"):
            ours(x, x, x)
        layer = nn.TransformerEncoderLayer(E, H, FF, batch_first=batch_first)
        layer.linear1.bias = torch.nn.Parameter(layer.linear1.bias.half())
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x)
        # in torch this works only by accident: the product with a transposed input adds the bias afterwards
        if batch_first:
            theirs(x, x, x)


class TestScaledDotProductAttention:
    def test_choice_of_a_kernel_of_torch_changes_nothing(self):
        q = torch.randn(2, H, L, 8)
        expected = fastattn.scaled_dot_product_attention(q, q, q)
        for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
            with sdpa_kernel(kernel):
                assert torch.equal(fastattn.scaled_dot_product_attention(q, q, q), expected)

    @pytest.mark.parametrize("dims", [3, 4])
    @pytest.mark.parametrize("mask", [torch.arange(L) > 1, torch.arange(float(L)), torch.tensor(2.0)])
    def test_a_mask_may_have_fewer_than_two_dimensions(self, mask, dims):
        """torch's math kernel serves it, the others raise IndexError."""
        q = torch.randn(2, H, L, 8)[:, 0] if dims == 3 else torch.randn(2, H, L, 8)
        q.requires_grad_()
        mask = mask if mask.dtype == torch.bool else mask.clone().requires_grad_()
        inputs = [t for t in (q, mask) if t.requires_grad]
        with sdpa_kernel(SDPBackend.MATH):
            expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, mask)
        got = fastattn.scaled_dot_product_attention(q, q, q, mask)
        torch.testing.assert_close(got, expected)
        grads = (torch.autograd.grad(out.square().sum(), inputs) for out in (got, expected))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("mask", [torch.ones(L, L, dtype=torch.bool), torch.zeros(L, L)], ids=["bool", "float"])
    def test_a_mask_beside_is_causal_raises(self, mask):
        """torch's documentation says so, but its kernel for the CPU accepts both."""
        q = torch.randn(2, H, L, 8)
        with pytest.raises(RuntimeError, match="attn_mask should not be set when is_causal=True"):
            fastattn.scaled_dot_product_attention(q, q, q, mask, is_causal=True)

    @pytest.mark.parametrize(
        ("k_shape", "v_shape"),
        [((2, H, 3, 8), (2, H, 7, 8)), ((2, H, 0, 8), (0, H, 0, 8)), ((2, H, 0, 5), (2, H, 0, 8))],
    )
    def test_sizes_that_do_not_fit_raise(self, k_shape, v_shape):
        """They raise even if no element is read."""
        with pytest.raises(RuntimeError, match="scaled_dot_product_attention: "):
            fastattn.scaled_dot_product_attention(torch.randn(2, H, L, 8), torch.randn(k_shape), torch.randn(v_shape))
