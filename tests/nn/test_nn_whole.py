"""The encoder layer as one call: right against fp64, never stale, and not used if a child has additions."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from threads import same_bits
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn.nn import whole
from fastattn.ops import _gemm
from fastattn.ops._backends import why_not_available

pytestmark = pytest.mark.skipif(why_not_available("native", "cpu") is not None, reason="no C++ kernels")


@pytest.fixture
def calls(monkeypatch):
    """The calls of the op so far."""
    found, original = [], whole.encode_layer
    monkeypatch.setattr(whole, "encode_layer", lambda *args: found.append(args) or original(*args))
    return found


def make(d_model=24, heads=3, d_ff=40, activation="gelu", batch_first=True, norm_first=False, **options):
    torch.manual_seed(0)
    layer = fastattn.nn.TransformerEncoderLayer(
        d_model, heads, d_ff, 0.1, activation, batch_first=batch_first, norm_first=norm_first, **options
    )
    for p in layer.parameters():  # biases and norms of torch start at 0 and 1
        torch.nn.init.normal_(p, std=0.3)
    return layer.eval()


def in_fp64(layer, x, **masks):
    """torch.nn's layer with the same weights, in fp64."""
    attn = layer.self_attn
    other = torch.nn.TransformerEncoderLayer(
        attn.embed_dim, attn.num_heads, layer.linear1.out_features, 0.1, layer.activation,
        batch_first=attn.batch_first, norm_first=layer.norm_first, bias=layer.linear1.bias is not None,
        dtype=torch.float64,
    ).eval()  # fmt: skip
    other.load_state_dict(layer.state_dict())
    masks = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in masks.items()}
    with torch.no_grad():
        return other(x.double(), **masks)


def masks_for(kind, batch, seqlen, heads):
    rng = torch.Generator().manual_seed(1)
    hidden = torch.rand(seqlen, seqlen, generator=rng) < 0.4
    hidden.fill_diagonal_(False)
    padding = torch.zeros(batch, seqlen, dtype=torch.bool)
    padding[-1, seqlen // 2 + 1 :] = True
    added = torch.randn(batch * heads, seqlen, seqlen, generator=rng)
    causal = torch.ones(seqlen, seqlen, dtype=torch.bool).triu_(1)
    return {
        "none": {},
        "causal": {"src_mask": causal, "is_causal": True},
        "bool": {"src_mask": hidden},
        "float per head": {"src_mask": added},
        "padding": {"src_key_padding_mask": padding},
        "both": {"src_mask": hidden, "src_key_padding_mask": padding},
        "two floats": {
            "src_mask": added,
            "src_key_padding_mask": torch.zeros(batch, seqlen).masked_fill(padding, -9.0),
        },
    }[kind]


@pytest.mark.parametrize("most", [(0, 0), (1000, 0), (0, 1000), None], ids=["torch", "few rows", "ours", "chosen"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_every_product_equals_fp64(calls, monkeypatch, most, norm_first):
    """Each case sets how many rows go to the kernel for few rows, to the other kernel, or to torch's library."""
    if most is not None:
        monkeypatch.setattr(_gemm, "most_rows", lambda *_: most)
    for bias in (True, False):
        layer, x = make(norm_first=norm_first, bias=bias), torch.randn(2, 13, 24)
        with torch.no_grad():
            y = layer(x)
        torch.testing.assert_close(y.double(), in_fp64(layer, x), rtol=1e-4, atol=1e-4)
    assert len(calls) == 2


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float per head", "padding", "both", "two floats"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_equals_fp64(calls, kind, batch_first, norm_first):
    layer = make(activation="relu" if batch_first else "gelu", batch_first=batch_first, norm_first=norm_first)
    for batch, seqlen in ((1, 1), (1, 16), (3, 7), (2, 65)):
        x = torch.randn((batch, seqlen, 24) if batch_first else (seqlen, batch, 24))
        masks = masks_for(kind, batch, seqlen, 3)
        calls.clear()
        with torch.no_grad():
            y = layer(x, **masks)
        assert len(calls) == 1
        torch.testing.assert_close(y.double(), in_fp64(layer, x, **masks), rtol=1e-4, atol=1e-4)


def in_parts(layer, monkeypatch, *args, **kwargs):
    """The layer by calls of its children."""
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr("fastattn.nn.encoder.encode", lambda *_: None)
        return layer(*args, **kwargs)


@pytest.mark.skipif(not _gemm.has_products(torch.bfloat16), reason="no fast products of bf16 on this processor")
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float per head", "padding", "two floats"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_bf16_is_as_near_to_fp64_as_its_parts(calls, monkeypatch, kind, norm_first):
    for d_model, d_ff, most in ((24, 40, None), (24, 40, 0), (513, 601, None)):
        if most is not None:
            monkeypatch.setattr(_gemm, "_most_rows_bf16", most)
        layer = make(d_model, 3, d_ff, batch_first=True, norm_first=norm_first)
        for p in layer.parameters():
            torch.nn.init.normal_(p, std=0.3 if d_model < 100 else 0.05)
        layer = layer.bfloat16()
        for batch, seqlen in ((1, 1), (3, 7), (2, 65)):
            x, masks = torch.randn(batch, seqlen, d_model).bfloat16(), masks_for(kind, batch, seqlen, 3)
            masks = {k: v.bfloat16() if v is not True and v.dtype == torch.float32 else v for k, v in masks.items()}
            calls.clear()
            with torch.no_grad():
                y = layer(x, **masks)
            assert len(calls) == 1
            assert y.dtype == torch.bfloat16
            exact, parts = in_fp64(layer, x, **masks), in_parts(layer, monkeypatch, x, **masks)
            error, theirs = ((found.double() - exact).square().mean().sqrt() for found in (y, parts))
            assert error <= 1.5 * theirs + 2**-9 * exact.square().mean().sqrt()


def test_bf16_goes_in_parts_with_mixed_weights_and_under_autocast(calls):
    x = torch.randn(2, 5, 24).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert make()(x.float()).shape == x.shape
    mixed = make().bfloat16()
    mixed.norm1.float()
    with torch.no_grad():
        assert mixed(x).shape == x.shape
    assert not calls


def test_odd_sizes_strides_and_missing_parameters(calls):
    for d_model, heads, d_ff, bias in ((5, 1, 3, True), (33, 3, 17, False), (64, 2, 129, True)):
        layer = make(d_model, heads, d_ff, bias=bias)
        for x in (
            torch.randn(2, 5, 2 * d_model)[..., ::2],
            torch.randn(5, 4, d_model).transpose(0, 1),
            torch.randn(7, d_model),
        ):
            with torch.inference_mode():
                y = layer(x)
            torch.testing.assert_close(y.double(), in_fp64(layer, x), rtol=1e-4, atol=1e-4)
    assert len(calls) == 9
    for dtype in (torch.float32, torch.bfloat16):  # PyTorch calls an empty tensor contiguous whatever its strides
        x = torch.empty(0, 4, 128, dtype=dtype)
        with torch.inference_mode():
            assert layer.to(dtype)(x[..., ::2]).shape == layer(x[..., :64]).shape == (0, 4, 64)


def test_reads_no_memory_around_its_operands(calls):
    layer = make(24, 3, 40)

    def surrounded(t):
        around = torch.full((t.numel() + 64,), float("nan"))
        around[32:-32] = t.flatten()
        return around[32:-32].view(t.shape)

    x = torch.randn(2, 9, 24)
    with torch.no_grad():
        expected = layer(x)
        for module in layer.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = torch.nn.Parameter(surrounded(p))
        assert torch.equal(layer(surrounded(x)), expected)


def test_the_bits_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(_gemm, "most_rows", lambda *_: (20, 1000))  # torch's library may add in another order
    layer = make(64, 4, 256)
    with torch.no_grad():
        for x in (torch.randn(1, 16, 64), torch.randn(3, 50, 64)):
            same_bits(functools.partial(layer, x), range(1, 9))


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Look(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


CHILDREN = (
    "self_attn", "self_attn.out_proj", "linear1", "dropout", "linear2", "norm1", "norm2", "dropout1", "dropout2"
)  # fmt: skip


@pytest.mark.parametrize("name", CHILDREN)
def test_a_hook_on_any_child_is_called(calls, name):
    layer, seen = make(), []
    layer.get_submodule(name).register_forward_hook(lambda *_: seen.append(name))
    with torch.no_grad():
        layer(torch.randn(1, 4, 24))
    assert seen == [name]
    assert not calls


@pytest.mark.parametrize("change", ["class", "forward"])
@pytest.mark.parametrize("name", CHILDREN)
def test_another_class_or_forward_of_any_child_is_used(calls, name, change):
    seen, layer = [], make()
    child = layer.get_submodule(name)
    forward = type(child).forward

    def watched(self, *args, **kwargs):
        seen.append(name)
        return forward(self, *args, **kwargs)

    if change == "class":
        child.__class__ = type("Other", (type(child),), {"forward": watched})
    else:
        child.forward = watched.__get__(child)
    with torch.no_grad():
        layer(torch.randn(1, 4, 24))
    assert seen == [name]
    assert not calls


def test_it_serves_only_plain_calls_without_gradients(calls):
    x = torch.randn(1, 4, 24)

    def count(layer, x=x, context=torch.no_grad):
        calls.clear()
        with context(), torch.no_grad():
            layer(x)
        return len(calls)

    assert count(make()) == 1
    assert count(make().train()) == 0
    drops = make()
    drops.dropout1.train()
    assert count(drops) == 0
    attends = make()
    attends.self_attn.train()
    assert count(attends) == 0
    attends.self_attn.dropout = 0.0
    assert count(attends) == 1
    assert count(make(activation=torch.tanh)) == 0
    assert count(make(strict_torch=True)) == 0
    assert count(make(), context=lambda: torch.autocast("cpu")) == 0
    assert count(make(), context=Watch) == 0
    assert count(make(), context=Look) == 0
    assert count(make(), context=lambda: fastattn.use_backend("reference")) == 0
    assert count(make().double(), x.double()) == 0
    assert count(make().half(), x.half()) == 0
    calls.clear()
    assert make()(x).requires_grad
    assert not calls


def test_a_patched_function_is_called(calls, monkeypatch):
    seen, original = [], F.layer_norm
    monkeypatch.setattr(F, "layer_norm", lambda *args, **kwargs: seen.append(1) or original(*args, **kwargs))
    with torch.no_grad():
        make()(torch.randn(1, 4, 24))
    assert seen
    assert not calls


def _replace(p, module, name):
    module._parameters[name] = torch.nn.Parameter(p.detach() * 2)


WRITES = {
    "in place": lambda p, *_: p.mul_(2),
    "data": lambda p, *_: p.data.mul_(2),
    "numpy": lambda p, *_: p.detach().numpy().__imul__(2),
    "another parameter": _replace,
}


@pytest.mark.parametrize("name", ["in_proj_weight", "in_proj_bias"])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_projection_held_as_a_plain_attribute_is_used(calls, name, gradients):
    """The replicas of DataParallel hold it in this way."""
    layer, x = make(), torch.randn(2, 4, 24)
    other = copy.deepcopy(layer)
    value = other.self_attn._parameters.pop(name).detach()
    setattr(other.self_attn, name, value)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(other(x), layer(x))


@pytest.mark.parametrize("way", WRITES)
def test_no_weight_is_stale(calls, way):
    layer, x = make(), torch.randn(2, 6, 24)
    names = [name for name, _ in layer.named_parameters()]
    with torch.no_grad():
        for name in names:
            changed = copy.deepcopy(layer)
            changed(x)
            path, _, last = name.rpartition(".")
            module = changed.get_submodule(path)
            WRITES[way](module._parameters[last], module, last)
            y = changed(x)
            torch.testing.assert_close(y.double(), in_fp64(changed, x), rtol=1e-4, atol=1e-4)
            assert not torch.equal(y, layer(x)), name
    assert calls


def test_errors_are_those_of_the_parts():
    layer = make()
    with torch.no_grad():
        for masks in ({"src_mask": torch.zeros(4, 5)}, {"src_key_padding_mask": torch.zeros(1, 9, dtype=torch.bool)}):
            with pytest.raises((RuntimeError, AssertionError), match="hape"):
                layer(torch.randn(1, 4, 24), **masks)
        with pytest.raises((RuntimeError, AssertionError, ValueError)):
            layer(torch.randn(1, 4, 23))


def test_the_raw_op_checks_its_operands():
    found = whole.read_plain(make(), "gelu", whole.read_tensors(make()))
    op = torch.ops.fastattn.layer_encode.native
    x = torch.randn(2, 3, 24)
    rest = (None, None, False, [], False, True, 0, 0, *found[2:])
    torch.library.opcheck(op, (x, found.norms, [t.detach() for t in found.linears], *rest), test_utils="test_schema")
    wrong = list(found.linears)
    wrong[0] = torch.randn(3 * 24, 25)
    for rows, linears in ((x[0], found.linears), (x.double(), found.linears), (x, found.linears[:6]), (x, wrong)):
        with pytest.raises(RuntimeError, match="layer"):
            op(rows, found.norms, linears, *rest)
    with pytest.raises(RuntimeError, match="mask"):
        op(x, found.norms, found.linears, torch.ones(1, 1, 2, 2, dtype=torch.bool), *rest[1:])
