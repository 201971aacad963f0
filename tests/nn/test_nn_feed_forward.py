"""The FeedForward module."""

import pytest
import torch

from fastattn import nn, reference

E, FF = 8, 20


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_against_the_reference(activation, gated, bias, recompute):
    torch.manual_seed(0)
    module = nn.FeedForward(E, FF, activation=activation, gated=gated, bias=bias, recompute=recompute)
    x = torch.randn(3, 5, E, requires_grad=True)
    gate = (module.gate.weight, module.gate.bias) if gated else (None, None)
    weights = module.linear1.weight, module.linear1.bias, module.linear2.weight, module.linear2.bias
    expected = reference.feed_forward(x, *weights, activation=activation, w_gate=gate[0], b_gate=gate[1])
    leaves = [x, *module.parameters()]
    torch.testing.assert_close(module(x), expected)
    for got, truth in zip(
        torch.autograd.grad(module(x).square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_hooks_make_it_call_its_children(gated):
    module, x = nn.FeedForward(E, FF, gated=gated), torch.randn(3, E)
    plain = module(x)
    for child in ("linear1", "linear2", "dropout", "gate")[: 3 + gated]:
        called = []
        handle = module.get_submodule(child).register_forward_hook(lambda *args, called=called: called.append(True))
        torch.testing.assert_close(module(x), plain)
        handle.remove()
        assert called, child


def test_dropout_in_training_only():
    module, x = nn.FeedForward(E, FF, dropout=0.5), torch.randn(3, E)
    torch.manual_seed(0)
    first = module(x)
    torch.manual_seed(0)
    torch.testing.assert_close(module(x), first)
    assert not torch.allclose(module(x), first)
    module.eval()
    torch.testing.assert_close(module(x), module(x))


def test_unknown_activation():
    with pytest.raises(ValueError, match=r"activation must be one of gelu, .* got 'tanh'"):
        nn.FeedForward(E, FF, activation="tanh")


@pytest.mark.parametrize("scale", [100.0, 300.0])
def test_float16_overflows_only_where_plain_pytorch_does(scale):
    """Under autocast both keep the hidden layer and its gradients in float16."""
    torch.manual_seed(0)
    module = nn.FeedForward(16, 64, activation="silu", gated=True)
    x = (scale * torch.randn(32, 16)).requires_grad_()

    def plain(x):
        return module.linear2(torch.nn.functional.silu(module.gate(x)) * module.linear1(x))

    results = []
    for function in (module, plain):
        with torch.autocast("cpu", torch.float16):
            y = function(x)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *module.parameters()])])
    ours, theirs = results
    assert not all(t.isfinite().all() for t in theirs)
    for got, expected in zip(ours, theirs, strict=True):
        assert got.isfinite()[expected.isfinite()].all()
