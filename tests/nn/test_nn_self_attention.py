"""MultiheadAttention of a sequence to itself in training as one node: equal to its parts and to fp64, or left alone."""

import functools

import pytest
import torch
from encoder_step import MASKS, assert_close, masks_for
from threads import same_bits

import fastattn
from fastattn.nn import attention, self_attention
from fastattn.ops import _gemm
from fastattn.ops._backends import why_not_available

pytestmark = pytest.mark.skipif(why_not_available("native", "cpu") is not None, reason="no C++ kernels")


@pytest.fixture
def calls(monkeypatch):
    """The calls of the node so far."""
    found, original = [], self_attention.train_attention
    monkeypatch.setattr(self_attention, "train_attention", lambda *args: found.append(args) or original(*args))
    return found


@pytest.fixture
def parts(monkeypatch):
    """Runs a function with the module computed part by part."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(attention, "train_itself", lambda *_: None)
            return function()

    return run


def make(width=24, heads=3, dropout=0.0, cls=None, **options):
    torch.manual_seed(0)
    options = {"batch_first": True} | options
    module = (cls or fastattn.nn.MultiheadAttention)(width, heads, dropout, **options)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module


def step(module, x, seed=5, **masks):
    """{name: tensor} of the result, all gradients, and the next random number."""
    torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    y, weights = module(x, x, x, need_weights=False, **masks)
    assert weights is None
    after, inputs = torch.rand(1), {"x": x} | dict(module.named_parameters())
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).cos()
    return {
        "y": y.detach(),
        "random": after,
        **dict(zip(inputs, torch.autograd.grad(y, inputs.values(), dy), strict=True)),
    }


def arguments(kind, batch, seqlen):
    """The masks of an encoder layer by the names of MultiheadAttention."""
    names = {"src_mask": "attn_mask", "src_key_padding_mask": "key_padding_mask"}
    return {names.get(name, name): value for name, value in masks_for(kind, batch, seqlen).items()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_parts(calls, parts, bias, batch_first, dropout):
    """Dropout draws the same masks, and the generator is left in the same state."""
    module = make(dropout=dropout, bias=bias, batch_first=batch_first)
    for number, kind in enumerate(MASKS):
        x = torch.randn((3, 7, 24) if batch_first else (7, 3, 24))
        masks = arguments(kind, 3, 7)
        found = step(module, x, **masks)
        assert len(calls) == number + 1
        assert_close(found, parts(lambda x=x, masks=masks: step(module, x, **masks)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["none", "causal", "both"])
@pytest.mark.parametrize(("batch", "seqlen", "heads"), [(1, 1, 1), (2, 33, 3), (5, 16, 6)])
def test_is_as_near_to_fp64_as_torch(calls, monkeypatch, batch, seqlen, heads, kind, dtype):
    monkeypatch.setattr(_gemm, "has_products", lambda _: True)
    module, torchs = make(heads=heads).to(dtype), make(heads=heads, cls=torch.nn.MultiheadAttention).to(dtype)
    exact = make(heads=heads, cls=torch.nn.MultiheadAttention).to(dtype).double()
    x, masks = torch.randn(batch, seqlen, 24).to(dtype), arguments(kind, batch, seqlen)
    found = step(module, x, **masks)
    if kind == "causal":
        masks["attn_mask"] = torch.ones(seqlen, seqlen, dtype=torch.bool).triu_(1)
    expected, reference = step(torchs, x, **masks), step(exact, x.double(), **masks)
    for name, t in reference.items():
        scale, times = float(t.abs().max()), 2 if name == "y" else 3
        error, allowed = ((r[name].double() - t).abs().max() for r in (found, expected))
        assert error <= times * allowed + 2 * torch.finfo(dtype).eps * scale, name
    assert len(calls) == 1


def test_strides_and_nothing_at_all(calls, parts):
    module = make()
    for x in (
        torch.randn(5, 2, 24).transpose(0, 1),
        torch.randn(2, 5, 48)[..., ::2],
        torch.randn(2, 1, 24).expand(2, 5, 24),
    ):
        assert_close(step(module, x), parts(lambda x=x: step(module, x)))
    assert len(calls) == 3
    for shape in ((0, 5, 24), (2, 0, 24)):
        assert step(module, torch.randn(shape))["y"].shape == shape
    assert step(module, torch.randn(5, 24))["y"].shape == (5, 24)
    assert len(calls) == 3


def test_the_bits_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(_gemm, "most_rows", lambda *_: (20, 1000))  # torch's library may add in another order
    monkeypatch.setattr(_gemm, "most_rows_of_gradients", lambda *_: (1000, 1000))
    for x in (torch.randn(1, 16, 64), torch.randn(3, 50, 64)):
        same_bits(functools.partial(step, make(64, 4, 0.1), x))


def test_derivatives_of_derivatives_and_several_at_once_are_those_of_the_parts(calls, parts):
    module, x = make(8, 2, 0.3, batch_first=False), torch.randn(4, 3, 8)

    def second():
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        y, _ = module(leaf, leaf, leaf, need_weights=False, **arguments("float", 3, 4))
        (dx,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        grads = torch.autograd.grad(
            dx.square().sum(), (leaf, *module.parameters()), retain_graph=True, allow_unused=True
        )
        dy = torch.stack([torch.ones_like(y), torch.linspace(-1, 1, y.numel()).view_as(y)])
        grads += torch.autograd.grad(y, (leaf, *module.parameters()), dy, is_grads_batched=True)
        return {str(i): g for i, g in enumerate(grads) if g is not None}

    assert_close(second(), parts(second), 1e-4)
    assert len(calls) == 1


def test_it_serves_only_plain_modules_that_train_as_a_whole(calls):
    x = torch.randn(2, 5, 24)

    def count(module, x=x, key=None, need_weights=False, **masks):
        calls.clear()
        module(x, x if key is None else key, x, need_weights=need_weights, **masks)
        return len(calls)

    assert count(make()) == 1
    assert count(make(), need_weights=True) == count(make(), key=x.clone()) == 0
    assert count(make(add_bias_kv=True)) == count(make(add_zero_attn=True)) == count(make(strict_torch=True)) == 0
    assert count(make(), attn_mask=torch.zeros(5, 5, requires_grad=True)) == 0
    assert count(make().double(), x.double()) == 0
    frozen = make()
    frozen.out_proj.bias.requires_grad_(False)
    assert count(frozen) == 0
    with torch.no_grad():
        assert count(make()) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert count(make()) == 0
    with fastattn.use_backend("reference"):
        assert count(make()) == 0
    other = make()
    other.__class__ = type("Other", (fastattn.nn.MultiheadAttention,), {})
    assert count(other) == 0


def test_what_hangs_on_the_children_is_called(calls):
    x, seen = torch.randn(2, 5, 24), []
    for change in (
        lambda m: m.out_proj.register_forward_hook(lambda *_: seen.append(1)),
        lambda m: setattr(m.out_proj, "forward", lambda t: seen.append(1) or t),
        lambda m: setattr(m, "attend", lambda *_: seen.append(1) or (x, None)),
    ):
        module = make()
        for _ in range(2):  # the second call uses the values that were cached in the first
            module(x, x, x, need_weights=False)
        assert len(calls) == 2
        change(module)
        module(x, x, x, need_weights=False)
        assert len(seen) == 1
        assert len(calls) == 2
        calls.clear()
        seen.clear()


def test_changes_take_effect(calls):
    module, x = make(), torch.randn(2, 5, 24)
    first = step(module, x)["y"]
    module.dropout = 0.5
    assert not torch.equal(step(module, x)["y"], first)
    module.eval()
    assert torch.equal(step(module, x)["y"], first)
    with torch.no_grad():
        module.in_proj_bias.mul_(2)
    second = step(module, x)["y"]
    assert not torch.equal(second, first)
    module.out_proj = torch.nn.Linear(24, 24)
    assert not torch.equal(step(module, x)["y"], second)
    module.num_heads = 2
    module.out_proj.weight.data = torch.ones(24, 23)
    with pytest.raises(RuntimeError, match="shape"):
        step(module, x)
    assert len(calls) == 5


def _bias_kv(module):
    module.bias_k, module.bias_v = (torch.nn.Parameter(torch.ones(1, 1, 24)) for _ in range(2))


def _plain_attribute(module):
    module.in_proj_weight = module._parameters.pop("in_proj_weight").detach() * 2


CHANGES = {
    "data": lambda m: [setattr(p, "data", p.data * 2) for p in m.parameters()],
    "strides": lambda m: [setattr(p, "data", p.data.mT.contiguous().mT * 2) for p in m.parameters() if p.dim() == 2],
    "parameter": lambda m: setattr(m, "in_proj_bias", torch.nn.Parameter(torch.ones(72))),
    "no bias": lambda m: setattr(m.out_proj, "bias", None),
    "plain attribute": _plain_attribute,
    "bias_k": _bias_kv,
    "zero key": lambda m: setattr(m, "add_zero_attn", True),
    "layout": lambda m: setattr(m, "batch_first", False),
    "heads": lambda m: setattr(m, "num_heads", 2),
    "out_proj": lambda m: setattr(m, "out_proj", torch.nn.Linear(24, 24)),
    "pre-hook": lambda m: m.out_proj.register_forward_pre_hook(lambda _, x: (x[0] * 2,)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_takes_effect(parts, change):
    """A change takes effect although values read from the module are cached."""
    module, x = make(), torch.randn(2, 5, 24)
    before, _ = module(x, x, x, need_weights=False)
    CHANGES[change](module)
    y, _ = module(x, x, x, need_weights=False)
    expected, _ = parts(lambda: module(x, x, x, need_weights=False))
    torch.testing.assert_close(y, expected)
    assert not torch.allclose(y, before)


def test_the_raw_ops_check_their_operands():
    x, weight, none = torch.randn(2, 3, 8), torch.randn(24, 8), torch.empty(0)
    options = [0.0] * 6 + [0.0, 0.0, 1.0, 0.0, 0, 0, 0, 0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    fwd, bwd = torch.ops.fastattn.layer_encode_fwd.native, torch.ops.fastattn.layer_encode_bwd.native
    linears = [weight, none, none, torch.randn(8, 8), none, none]
    y, *kept = fwd(x, [], linears, None, None, [], None, options)
    dx, dweight, *_ = bwd(y, kept, True, False, x, [], linears, None, None, [], None, options)
    assert (dx.shape, dweight.shape) == (x.shape, weight.shape)
    for wrong in (
        [weight[:23], *linears[1:]],
        [*linears[:3], torch.randn(8, 7), none, none],
        [weight.double(), *linears[1:]],
    ):
        with pytest.raises(RuntimeError):
            fwd(x, [], wrong, None, None, [], None, options)
    with pytest.raises(RuntimeError, match="kept"):
        bwd(y, kept[:1], True, False, x, [], linears, None, None, [], None, options)
    halves = [t.bfloat16() for t in linears]
    with pytest.raises(RuntimeError, match=r"bfloat16|autocast"):
        fwd(x, [], halves, None, None, [], None, [*options[:9], 1.0, *options[10:]])
