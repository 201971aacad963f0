"""User changes to a layer take effect: overridden blocks, hooks, LoRA, pruning, replaced children."""

import layer_pairs
import pytest
import torch
from layer_pairs import FF, LAYERS, E, H, assert_same, build
from nn_oracle import slow_path
from torch.nn.utils import parametrize, prune

import fastattn.nn.sublayers
from fastattn import nn

fused = layer_pairs.fused  # a fixture


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_untouched_layer_is_fused(name, norm_first, fused):
    ours, theirs, x = build(name, norm_first=norm_first)
    assert_same(ours, theirs, x)
    assert len(fused) == len(x) + (not norm_first)  # a pre-norm layer ends with a residual add without a norm


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_the_norm_adds_the_biases_before_it_where_they_want_gradients(name, norm_first, monkeypatch):
    """out_proj of every attention, and linear2 unless the layer ends without a norm; hooked children are called."""
    ours, theirs, x = build(name, norm_first=norm_first)
    added, layer_norm = [], fastattn.nn.sublayers.layer_norm

    def noted(*args, x_bias=None, **options):
        added.append(x_bias)
        return layer_norm(*args, x_bias=x_bias, **options)

    monkeypatch.setattr(fastattn.nn.sublayers, "layer_norm", noted)
    attentions = [m for m in ours.modules() if isinstance(m, torch.nn.MultiheadAttention)]
    wanted = [m.out_proj.bias for m in attentions] + ([] if norm_first else [ours.linear2.bias])

    def of_one_call():
        added.clear()
        out = ours(*x)
        return out, [bias for bias in added if bias is not None]

    out, biases = of_one_call()
    assert [id(bias) for bias in biases] == [id(bias) for bias in wanted]
    with slow_path():
        expected = theirs(*x)
    torch.testing.assert_close(out, expected)
    found = torch.autograd.grad(out.square().sum(), list(ours.parameters()))
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), list(theirs.parameters())))
    with torch.no_grad():
        assert of_one_call()[1] == []
    handle = attentions[0].out_proj.register_forward_hook(lambda *args: None)
    assert len(of_one_call()[1]) == len(wanted) - 1
    handle.remove()
    for bias in wanted:
        bias.requires_grad_(False)
    assert of_one_call()[1] == []


class Doubled:
    """A block that doubles its result, as a user's subclass might."""

    def _sa_block(self, *args, **kwargs):
        return 2 * super()._sa_block(*args, **kwargs)


class DoubledCross:
    def _mha_block(self, *args, **kwargs):
        return 2 * super()._mha_block(*args, **kwargs)


class DoubledFF:
    def _ff_block(self, x):
        return 2 * super()._ff_block(x)


MIXINS = [(name, mixin) for name in LAYERS for mixin in (Doubled, DoubledFF)] + [(LAYERS[1], DoubledCross)]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(("name", "mixin"), MIXINS)
def test_overridden_blocks(name, norm_first, mixin, fused):
    ours, theirs, x = build(name, norm_first=norm_first)
    plain = ours(*x)
    del fused[:]
    ours.__class__ = type("Mine", (mixin, getattr(nn, name)), {})
    theirs.__class__ = type("Theirs", (mixin, getattr(torch.nn, name)), {})
    assert_same(ours, theirs, x)
    assert not fused
    assert not torch.allclose(ours(*x), plain)


def test_block_set_on_the_object(fused):
    for name, attribute in ((LAYERS[0], "_ff_block"), (LAYERS[1], "_mha_block"), (LAYERS[0], "_sa_block")):
        ours, theirs, x = build(name)
        for layer in (ours, theirs):
            setattr(layer, attribute, lambda x, *args, **kwargs: 3 * x)
        assert_same(ours, theirs, x)
    assert not fused


def test_overridden_self_attention_block_gets_float_masks():
    """torch's encoder layer passes on 0 and -inf, which user code may give to scaled_dot_product_attention."""
    seen = []

    class Mine(nn.TransformerEncoderLayer):
        def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
            seen.append((attn_mask, key_padding_mask, is_causal))
            return super()._sa_block(x, attn_mask, key_padding_mask, is_causal)

    layer, x = Mine(E, H, FF, 0.0, batch_first=True), torch.randn(3, 5, E)
    mask, padding = torch.ones(5, 5).triu(1).bool(), torch.zeros(3, 5).bool()
    expected = nn.TransformerEncoderLayer(E, H, FF, 0.0, batch_first=True)
    expected.load_state_dict(layer.state_dict())
    out = nn.TransformerEncoder(layer, 1)(x, mask, padding)
    torch.testing.assert_close(out, expected(x, mask, padding))
    assert seen[0][0].dtype == seen[0][1].dtype == torch.float32
    assert torch.equal(seen[0][0] == float("-inf"), mask)


CHILDREN = [
    "linear1",
    "linear2",
    "dropout",
    "norm1",
    "norm2",
    "dropout1",
    "dropout2",
    "self_attn",
    "self_attn.out_proj",
]


class TestHooks:
    @pytest.mark.parametrize("norm_first", [False, True])
    @pytest.mark.parametrize(
        ("name", "child"),
        [(name, child) for name in LAYERS for child in CHILDREN]
        + [(LAYERS[1], child) for child in ("norm3", "dropout3", "multihead_attn.out_proj")],
    )
    def test_forward_hook_changes_the_result(self, name, child, norm_first):
        ours, theirs, x = build(name, norm_first=norm_first)
        plain = ours(*x)

        def double(module, args, output):
            return (2 * output[0], output[1]) if isinstance(output, tuple) else 2 * output

        handles = [m.get_submodule(child).register_forward_hook(double) for m in (ours, theirs)]
        got = ours(*x)
        assert not torch.allclose(got, plain)
        if "out_proj" not in child:  # torch never calls out_proj as a module
            with slow_path():
                torch.testing.assert_close(got, theirs(*x))
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(ours(*x), plain)

    @pytest.mark.parametrize("kind", ["forward_pre", "full_backward", "full_backward_pre"])
    def test_other_kinds_fire(self, kind):
        ours, _, x = build(LAYERS[0])
        for child in CHILDREN:
            fired = []
            module = ours.get_submodule(child)
            handle = getattr(module, f"register_{kind}_hook")(lambda *args, fired=fired: fired.append(True))
            ours(x[0].requires_grad_()).sum().backward()
            handle.remove()
            assert fired, f"{kind} hook on {child}"

    def test_hooks_on_all_modules_fire_for_every_child(self):
        ours, _, x = build(LAYERS[0])
        names = {module: name for name, module in ours.named_modules()}
        called = []
        handle = torch.nn.modules.module.register_module_forward_hook(lambda m, *args: called.append(names.get(m)))
        try:
            ours(*x)
        finally:
            handle.remove()
        assert set(called) == set(names.values())


class LoRA(torch.nn.Module):
    """A linear layer plus a low-rank one. It exposes `weight` and `bias`, as such wrappers do."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.a = torch.nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype))
        self.b = torch.nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype))

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


class TestReplacedChildren:
    @pytest.mark.parametrize("name", LAYERS)
    @pytest.mark.parametrize("child", ["linear1", "linear2", "self_attn.out_proj"])
    def test_lora_takes_effect_and_learns(self, name, child):
        ours, _, x = build(name)
        plain = ours(*x)
        parent, _, attribute = child.rpartition(".")
        lora = LoRA(ours.get_submodule(child))
        setattr(ours.get_submodule(parent), attribute, lora)
        out = ours(*x)
        assert not torch.allclose(out, plain)
        (out * torch.randn_like(out)).sum().backward()
        assert lora.a.grad.any()
        assert lora.b.grad.any()
        lora.b.data.zero_()
        torch.testing.assert_close(ours(*x), plain)

    def test_masks_stay_small_beside_lora(self):
        """A layer that calls its children because of linear1 still passes bool masks to our attention."""
        ours, theirs, x = build(LAYERS[0])
        ours.linear1, theirs.linear1 = LoRA(ours.linear1), LoRA(theirs.linear1)
        theirs.load_state_dict(ours.state_dict())
        seen = []
        ours.self_attn.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
        mask, padding = torch.ones(5, 5).triu(1).bool(), torch.arange(5) > torch.tensor([4, 2, 3])[:, None]
        with slow_path():
            torch.testing.assert_close(ours(*x, mask, padding), theirs(*x, mask, padding))
        assert seen[0]["attn_mask"].dtype == seen[0]["key_padding_mask"].dtype == torch.bool

    @pytest.mark.parametrize("name", LAYERS)
    def test_other_modules(self, name):
        ours, theirs, x = build(name)
        for layer in (ours, theirs):
            layer.norm1 = torch.nn.RMSNorm(E, dtype=torch.float64)
            layer.dropout2 = torch.nn.Identity()
        assert_same(ours, theirs, x)

    @pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
    @pytest.mark.parametrize("child", ["linear1", "linear2", "dropout", "self_attn.out_proj"])
    def test_scripted_modules(self, child):
        ours, theirs, x = build("TransformerEncoderLayer")
        for layer in (ours, theirs):
            layer.set_submodule(child, torch.jit.script(layer.get_submodule(child)))
        assert_same(ours, theirs, x)
        ours.activation = "relu"
        with pytest.raises(TypeError, match="'str' object is not callable"):
            ours(*x)

    def test_torch_norm_is_fused_too(self, fused):
        ours, theirs, x = build(LAYERS[0])
        ours.norm1 = torch.nn.LayerNorm(E, elementwise_affine=False, dtype=torch.float64)
        theirs.norm1 = ours.norm1
        assert_same(ours, theirs, x)
        assert fused

    @pytest.mark.parametrize("name", LAYERS)
    @pytest.mark.parametrize("norm_first", [False, True])
    @pytest.mark.parametrize(
        ("path", "shape"),
        [
            ("linear1.bias", (1,)),
            ("linear2.bias", (5, E)),
            ("self_attn.out_proj.bias", (1, E)),
            ("linear2", (FF, 1)),
            ("self_attn.out_proj", (E, 1)),
            ("norm1", (5, E)),
            ("norm2", (1,)),
        ],
    )
    def test_shapes_that_torch_broadcasts(self, name, norm_first, path, shape):
        """Linear layers and norms of torch accept shapes that broadcast, so ours must compute the same."""
        ours, theirs, x = build(name, norm_first=norm_first)
        parent, _, child = path.rpartition(".")
        if child == "bias":
            new = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
        elif child.startswith("norm"):
            new = torch.nn.LayerNorm(shape, dtype=torch.float64)
        else:
            new = torch.nn.Linear(*shape, dtype=torch.float64)
        for layer in (ours, theirs):
            setattr(layer.get_submodule(parent), child, new)
        if shape == (1,) and child == "norm2":
            for layer in (ours, theirs):
                with pytest.raises(RuntimeError, match="normalized_shape"):
                    layer(*x)
            return
        assert_same(ours, theirs, x)

    @pytest.mark.parametrize("name", LAYERS)
    def test_the_number_of_heads_may_change(self, name):
        """torch computes head_dim in every call and does not read an attribute of that name."""
        ours, theirs, x = build(name)
        for layer in (ours, theirs):
            for module in layer.modules():
                if isinstance(module, torch.nn.MultiheadAttention):
                    module.num_heads = 2
        assert_same(ours, theirs, x)

    def test_custom_attention_gets_float_masks(self):
        class Custom(torch.nn.Module):
            batch_first = True

            def forward(self, q, k, v, attn_mask, key_padding_mask, need_weights, is_causal):
                assert attn_mask.is_floating_point()
                return torch.softmax(attn_mask, -1) @ v, None

        ours, theirs, x = build(LAYERS[0])
        ours.self_attn = theirs.self_attn = Custom()
        mask = torch.ones(5, 5).triu(1).bool()
        with slow_path():
            torch.testing.assert_close(ours(*x, mask), theirs(*x, mask))

    def test_pruning_and_parametrization(self):
        for touch in (
            lambda layer: prune.l1_unstructured(layer.linear1, "weight", 0.5),
            lambda layer: parametrize.register_parametrization(layer.linear2, "weight", torch.nn.Tanh()),
            lambda layer: parametrize.register_parametrization(layer.norm1, "weight", torch.nn.Tanh()),
            lambda layer: parametrize.register_parametrization(layer.self_attn, "in_proj_weight", torch.nn.Tanh()),
        ):
            ours, theirs, x = build(LAYERS[0])
            plain = ours(*x)
            touch(ours)
            touch(theirs)
            assert_same(ours, theirs, x)
            assert not torch.allclose(ours(*x), plain)

    def test_forward_set_on_a_child(self):
        for child in ("linear1", "norm2", "dropout2", "self_attn"):
            ours, _, x = build(LAYERS[0])
            plain, module = ours(*x), ours.get_submodule(child)
            called, forward = [], module.forward

            def patched(*args, called=called, forward=forward, **kwargs):
                called.append(True)
                return forward(*args, **kwargs)

            module.forward = patched
            torch.testing.assert_close(ours(*x), plain)
            assert called, child
