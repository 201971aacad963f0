"""A training step of an encoder layer as one node: equal to its parts and to fp64, and left alone where it must be."""

import copy
import functools
import itertools

import encoder_step
import pytest
import torch
from encoder_step import MASKS, assert_close, make, masks_for, step
from threads import same_bits

import fastattn
from fastattn.nn import whole
from fastattn.ops import _gemm
from fastattn.ops._backends import why_not_available

pytestmark = pytest.mark.skipif(why_not_available("native", "cpu") is not None, reason="no C++ kernels")
calls, parts = encoder_step.calls, encoder_step.parts  # fixtures


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_parts(calls, parts, norm_first, bias, batch_first, dropout):
    """Dropout draws the same masks, and the generator is left in the same state."""
    layer = make(dropout=dropout, bias=bias, batch_first=batch_first, norm_first=norm_first)
    for number, kind in enumerate(MASKS):
        x = torch.randn((3, 7, 24) if batch_first else (7, 3, 24))
        masks = masks_for(kind, 3, 7)
        found = step(layer, x, **masks)
        assert len(calls) == number + 1
        assert_close(found, parts(lambda x=x, masks=masks: step(layer, x, **masks)))


@pytest.mark.parametrize("places", ["self_attn", "dropout", "dropout1", "dropout2"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_each_dropout_alone(calls, parts, norm_first, places):
    layer, x = make(norm_first=norm_first), torch.randn(2, 9, 24)
    child = layer.get_submodule(places)
    if places == "self_attn":
        child.dropout = 0.4
    else:
        child.p = 0.4
    assert_close(step(layer, x), parts(lambda: step(layer, x)))
    assert len(calls) == 1
    child.eval()
    assert torch.equal(step(layer, x, seed=1)["y"], step(layer, x, seed=2)["y"])


@pytest.mark.skipif(not _gemm.serves_rows(2**20), reason="torch's library may add in another order")
@pytest.mark.parametrize("norm_first", [True, False])
def test_the_bits_are_those_of_the_parts(calls, parts, norm_first):
    """Except for sums that PyTorch makes in the parts, and for two gradients that one kernel adds here."""
    layer, x = make(64, 4, 128, 0.1, norm_first=norm_first), torch.randn(4, 65, 64)
    found, expected = step(layer, x), parts(lambda: step(layer, x))
    others = {"self_attn.in_proj_bias", "linear2.bias", "x"} if norm_first else {"self_attn.in_proj_bias"}
    assert [n for n in found if n not in others and not torch.equal(found[n], expected[n])] == []
    assert len(calls) == 1


@pytest.mark.parametrize("most", [(0, 0, 0, 0), (1000, 0, 0, 0), (0, 1000, 1000, 1000)], ids=["torch", "few", "ours"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_equals_fp64(calls, monkeypatch, norm_first, most):
    """Each case sets the number of rows up to which our kernels compute the products."""
    monkeypatch.setattr(_gemm, "most_rows", lambda *_: most[:2])
    monkeypatch.setattr(_gemm, "most_rows_of_gradients", lambda *_: most[2:])
    for d_model, heads, d_ff, batch, seqlen in ((24, 3, 40, 2, 13), (33, 3, 17, 1, 1), (8, 1, 3, 1, 70)):
        layer = make(d_model, heads, d_ff, norm_first=norm_first, activation="relu")
        wide = torch.nn.TransformerEncoderLayer(
            d_model, heads, d_ff, 0.0, "relu", batch_first=True, norm_first=norm_first, dtype=torch.float64
        )
        wide.load_state_dict(layer.state_dict())
        x = torch.randn(batch, seqlen, d_model)
        assert_close(step(layer, x), {**step(wide, x.double()), "random": step(layer, x)["random"]}, 1e-4)
    assert calls


def test_strides_one_sequence_and_nothing_at_all(calls, parts):
    layer = make(dropout=0.2)
    for x in (
        torch.randn(2, 5, 48)[..., ::2],
        torch.randn(5, 4, 24).transpose(0, 1),
        torch.randn(7, 24),
        torch.randn(0, 4, 24),
        torch.randn(2, 0, 24),
        torch.randn(0, 4, 48)[..., ::2],  # PyTorch calls it contiguous
    ):
        assert_close(step(layer, x), parts(lambda x=x: step(layer, x)))
    assert len(calls) == 6
    x = torch.randn(2, 5, 24)
    grads = torch.autograd.grad(layer(x).sum(), list(layer.parameters()))  # of an expanded gradient; x needs none
    assert all(torch.isfinite(g).all() for g in grads)


def test_reads_no_memory_around_its_operands(calls):
    layer, x = make(dropout=0.3), torch.randn(2, 9, 24)

    def surrounded(t):
        around = torch.full((t.numel() + 64,), float("nan"))
        around[32:-32] = t.detach().flatten()
        return around[32:-32].view(t.shape)

    expected = step(layer, x)
    for module in layer.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(surrounded(p))
    found = step(layer, surrounded(x))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_bits_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(_gemm, "most_rows", lambda *_: (20, 1000))  # torch's library may add in another order
    monkeypatch.setattr(_gemm, "most_rows_of_gradients", lambda *_: (1000, 1000))
    layer = make(64, 4, 256, 0.1)
    for x in (torch.randn(1, 16, 64), torch.randn(3, 50, 64), torch.randn(1, 300, 64)):
        same_bits(functools.partial(step, layer, x))


@pytest.mark.parametrize("norm_first", [True, False])
def test_second_derivatives_are_those_of_the_parts(calls, parts, norm_first):
    layer, x = make(8, 2, 12, 0.3, norm_first=norm_first, batch_first=norm_first), torch.randn(3, 4, 8)

    def second():
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        masks = masks_for("float", *(x.shape[:2] if norm_first else x.shape[1::-1]))
        y = layer(leaf, **masks)
        (dx,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        grads = torch.autograd.grad(dx.square().sum(), (leaf, *layer.parameters()), allow_unused=True)
        return {str(i): g for i, g in enumerate(grads) if g is not None}

    assert_close(second(), parts(second), 1e-4)
    assert len(calls) == 1


def test_several_gradients_at_once_are_those_of_the_parts(calls, parts):
    layer, x = make(8, 2, 12, 0.3), torch.randn(3, 4, 8)

    def batched():
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        dy = torch.stack([torch.ones_like(y), torch.linspace(-1, 1, y.numel()).view_as(y)])
        grads = torch.autograd.grad(y, (leaf, *layer.parameters()), dy, is_grads_batched=True)
        return {str(i): g for i, g in enumerate(grads)}

    assert_close(batched(), parts(batched), 1e-4)
    assert len(calls) == 1


def test_a_graph_can_be_used_twice_and_sees_changes(calls):
    layer, x = make(dropout=0.1), torch.randn(2, 5, 24)
    y = layer(x)
    once, twice = (torch.autograd.grad(y.sum(), list(layer.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    with torch.no_grad():
        layer.linear2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_backward_takes_tensors_with_other_strides(calls):
    """Hooks for saved tensors, and a new `data` of a parameter, may bring them."""
    layer, x = make(dropout=0.1), torch.randn(2, 5, 24)
    expected = step(layer, x)

    def transpose(t):
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    with torch.autograd.graph.saved_tensors_hooks(transpose, lambda t: t):
        assert_close(step(layer, x), expected)
    torch.manual_seed(5)
    y = layer(x)
    layer.linear1.weight.data = transpose(layer.linear1.weight.data)
    y.sum().backward()
    assert len(calls) == 3


def test_gradients_accumulate_and_belong_to_the_parameters(calls):
    layer, x = make(), torch.randn(2, 5, 24)
    layer(x).sum().backward()
    first = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer(x).sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad.is_contiguous()
        assert p.grad._base is None
        torch.testing.assert_close(p.grad, 2 * first[name])
    assert len(calls) == 2


def test_it_serves_only_plain_layers_that_train_as_a_whole(calls):
    x = torch.randn(1, 4, 24)

    def count(layer, x=x, context=None, **masks):
        calls.clear()
        with context or torch.enable_grad():
            layer(x, **masks)
        return len(calls)

    def hooked(name):
        layer = make()
        layer.get_submodule(name).register_forward_hook(lambda *_: None)
        return layer

    assert count(make(dropout=0.1)) == count(make(dropout=0.1).eval()) == 1
    frozen = make()
    frozen.linear1.weight.requires_grad_(False)
    assert count(frozen) == 0
    assert count(make().requires_grad_(False), x.clone().requires_grad_()) == 0
    assert [count(hooked(name)) for name in ("self_attn", "self_attn.out_proj", "linear1", "norm2", "dropout1")] == [
        0
    ] * 5
    assert count(make(), context=torch.autocast("cpu", torch.float16)) == 0
    assert count(make(), context=fastattn.use_backend("reference")) == 0
    assert count(make(), src_mask=torch.zeros(4, 4, requires_grad=True)) == 0
    assert count(make().double(), x.double()) == 0
    assert count(make(activation=torch.tanh)) == 0
    parametrized = make()
    torch.nn.utils.parametrizations.weight_norm(parametrized.linear1)
    assert count(parametrized) == 0
    wrong = make()
    wrong.self_attn.dropout = 1.5
    with pytest.raises(ValueError, match="dropout_p"):
        wrong(x)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(("name", "value"), [
    ("self_attn.num_heads", 5), ("norm1.eps", None), ("norm2.eps", "1"), ("norm1.eps", torch.tensor(1e-5)),
    ("norm2.eps", torch.tensor(1e-5, requires_grad=True)), ("dropout.p", None), ("self_attn.dropout", None),
    ("dropout2.p", torch.tensor(0.0)), ("dropout1.p", torch.tensor(0.1, requires_grad=True)),
])  # fmt: skip
def test_an_attribute_that_is_no_number_is_as_in_the_parts(parts, name, value, gradients):
    layer, x = make(), torch.randn(2, 5, 24)
    module, _, attribute = name.rpartition(".")
    layer.get_submodule(module).__dict__[attribute] = value

    def outcome():
        torch.manual_seed(0)
        try:
            with torch.set_grad_enabled(gradients):
                return layer(x).detach()
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            return type(error), str(error)

    found, expected = outcome(), parts(outcome)
    if isinstance(expected, tuple):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected)


def test_functional_calls_and_transforms_see_their_own_tensors(parts):
    layer, x = make(), torch.randn(2, 4, 24)
    values = {name: p.detach() * 1.5 for name, p in layer.named_parameters()}

    def loss(values):
        return torch.func.functional_call(layer, values, (x,)).square().sum()

    found, expected = torch.func.grad(loss)(values), parts(lambda: torch.func.grad(loss)(values))
    assert_close(found, expected, 1e-4)
    changed = copy.deepcopy(layer)
    changed.load_state_dict(values)
    torch.testing.assert_close(loss(values), changed(x).square().sum())


def test_the_raw_ops_check_their_operands():
    layer, x = make(dropout=0.1), torch.randn(2, 3, 24)
    linears, norms = whole.read_tensors(layer)
    linears = [t.detach() for t in whole.read_plain(layer, "gelu", (linears, norms)).linears]
    norms, rng = [t.detach() for t in norms], torch.zeros(4, 2, dtype=torch.int64)
    fwd, bwd = (getattr(torch.ops.fastattn, f"layer_encode_{name}").native for name in ("fwd", "bwd"))
    for norm_first, autocast in itertools.product((False, True), (False, True)):
        dropouts = [0.1, 0.1, 0.0, 0.0, 0.1, 0.1]
        rest = [*dropouts, False, False, True, autocast, 0, 0, 0, 0, 3, norm_first, 0, 1e-5, 1e-5, 0.0]
        inputs = (x, norms, linears, None, None, [], rng, rest)
        y, *kept = fwd(*inputs)
        for op, args in ((fwd, inputs), (bwd, (y, kept, True, False, *inputs))):
            torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    for wrong in (rng[:3], rng.int(), None):
        with pytest.raises(RuntimeError, match="rng"):
            fwd(x, norms, linears, None, None, [], wrong, rest)
    for wrong in (rest[1:], [*rest, 0]):
        with pytest.raises(RuntimeError, match="options"):
            fwd(x, norms, linears, None, None, [], rng, wrong)
    qkv, preact, others, weights = kept
    for dy, *saved in (
        (y[0], *kept), (y.double(), *kept), (y, qkv[:5], *kept[1:]), (y, qkv, preact.t(), others, weights),
        (y, qkv, preact, others, weights[1:]), (y, qkv.float(), *kept[1:]), (y, qkv, preact, others),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="layer"):
            bwd(dy, saved, True, False, *inputs)
