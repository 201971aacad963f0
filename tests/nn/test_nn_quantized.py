"""Quantised or sparse weights: layers leave them to their children, ops to F.linear."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import nn
from fastattn.nn.plain import is_plain

SIZES = [(32, 64), (256, 1024)]  # for the second size, oneDNN computes the products on some processors


class Half(torch.Tensor):
    """A stand-in for a quantised weight: memory in half precision, and only F.linear can use it."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)

    def __init__(self, weight):
        self.stored = weight.detach().half()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, bias = (*args, *(kwargs or {}).values(), None)[:3]
            return F.linear(x, weight.stored.to(weight.dtype), bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].stored.to(args[0].dtype))
        raise NotImplementedError(f"{cls.__name__} knows no {func}")


def _each_linear(model, change):
    for module in model.modules():
        if type(module) is torch.nn.Linear:  # not out_proj, whose weight torch.nn reads directly
            module.weight = torch.nn.Parameter(change(module.weight.detach()), requires_grad=False)


def _torchao(config):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return lambda model: quantization.quantize_(model, getattr(quantization, config)())


KINDS = {
    "half": lambda: lambda model: _each_linear(model, Half),
    "csr": lambda: lambda model: _each_linear(model, torch.Tensor.to_sparse_csr),
    "int8": lambda: _torchao("Int8WeightOnlyConfig"),
    "intx": lambda: _torchao("IntxWeightOnlyConfig"),
}


@pytest.fixture(params=KINDS)
def quantize(request):
    return KINDS[request.param]()


@pytest.fixture(params=SIZES, ids=str)
def sizes(request):
    return request.param


@pytest.fixture(autouse=True)
def _slow_path():
    torch.backends.mha.set_fastpath_enabled(False)  # torch's own fast path fails on quantised weights
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def assert_alike(ours, theirs, *inputs):
    """Results, and gradients of the first input, in evaluation and in training."""
    weights = torch.randn_like(theirs(*inputs))
    for train in (False, True):
        ours.train(train)
        theirs.train(train)
        with torch.no_grad():
            torch.testing.assert_close(ours(*inputs), theirs(*inputs), rtol=1e-4, atol=1e-5)
        x = inputs[0].clone().requires_grad_()
        grads = [torch.autograd.grad((m(x, *inputs[1:]) * weights).sum(), x)[0] for m in (ours, theirs)]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer(quantize, sizes, norm_first):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(sizes[0], 4, sizes[1], 0.0, batch_first=True, norm_first=norm_first)
    ours = copy.deepcopy(layer)
    fastattn.replace(ours)
    quantize(layer)
    quantize(ours)
    assert_alike(ours, layer, torch.randn(4, 64, sizes[0]))


def test_decoder_layer_and_attention(quantize):
    torch.manual_seed(0)
    layer = torch.nn.TransformerDecoderLayer(32, 4, 64, 0.0, batch_first=True)
    ours = copy.deepcopy(layer)
    fastattn.replace(ours)
    quantize(layer)
    quantize(ours)
    x = torch.randn(2, 9, 32)
    assert_alike(ours, layer, x, torch.randn(2, 5, 32))
    for got, want in zip(ours.self_attn(x, x, x), layer.self_attn(x, x, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward(quantize, sizes, gated):
    ours = nn.FeedForward(*sizes, activation="silu", gated=gated)
    quantize(ours)
    x = torch.randn(64, sizes[0])
    up = ours.linear1(x)
    right = ours.linear2(F.silu(ours.gate(x)) * up if gated else F.silu(up))
    torch.testing.assert_close(ours(x), right)
    gate = (ours.gate.weight, ours.gate.bias) if gated else (None, None)
    weights = (ours.linear1.weight, ours.linear1.bias, ours.linear2.weight, ours.linear2.bias)
    options = dict(zip(("w_gate", "b_gate"), gate, strict=True), activation="silu")
    torch.testing.assert_close(fastattn.feed_forward(x, *weights, **options), right)
    if weights[0].layout is torch.strided:  # PyTorch has no such product with sparse weights
        with torch.autocast("cpu", torch.bfloat16):
            out = fastattn.feed_forward(x, *weights, **options)
            wanted = ours(x)
        assert out.dtype == wanted.dtype
        torch.testing.assert_close(out.float(), right, rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match=r"backend 'native' .* it needs plain weights, got a"):
        fastattn.feed_forward(x, *weights, **options, backend="native")
    text = fastattn.explain("feed_forward", x, *weights, **options)
    assert "it needs plain weights, got a" in text
    assert "reference: runs" in text


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_linear_cross_entropy(quantize, reduction):
    head = torch.nn.Linear(64, 200)
    quantize(torch.nn.Sequential(head))
    x = torch.randn(3, 20, 64, requires_grad=True)
    target = torch.randint(0, 200, (3, 20))
    target[0, 3] = -100
    loss = fastattn.linear_cross_entropy(x, head.weight, target, bias=head.bias, reduction=reduction)
    right = F.cross_entropy(F.linear(x, head.weight, head.bias).flatten(0, 1), target.flatten(), reduction=reduction)
    torch.testing.assert_close(loss, right.view(loss.shape))
    for got, want in zip(
        torch.autograd.grad(loss.sum(), (x, head.bias)), torch.autograd.grad(right.sum(), (x, head.bias)), strict=True
    ):
        torch.testing.assert_close(got, want)
    assert "got a" in fastattn.explain("linear_cross_entropy", x, head.weight, target)


def test_out_proj_is_a_child_like_the_others():
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
    x = torch.randn(2, 9, 32)
    rounded = layer.self_attn.out_proj.weight.detach().half().float()
    right = copy.deepcopy(layer)
    right.self_attn.out_proj.weight.data = rounded
    layer.self_attn.out_proj.weight = torch.nn.Parameter(Half(rounded), requires_grad=False)
    torch.testing.assert_close(layer(x), right(x))


def test_dynamically_quantised_modules():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True).eval()
    ours = copy.deepcopy(layer)
    fastattn.replace(ours)
    ours, layer = (torch.ao.quantization.quantize_dynamic(m, {torch.nn.Linear}, torch.qint8) for m in (ours, layer))
    assert type(ours.linear1) is not torch.nn.Linear
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(ours(x), layer(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8])
def test_quantised_dtypes_are_refused(dtype):
    x = torch.randn(2, 8)
    w = torch.quantize_per_tensor(torch.randn(8, 8), 0.1, 0, dtype)
    q = torch.quantize_per_tensor(x, 0.1, 0, dtype)
    for call in (
        lambda: fastattn.layer_norm(q),
        lambda: fastattn.layer_norm(x, w[0]),
        lambda: fastattn.dropout(q, 0.5),
        lambda: fastattn.feed_forward(q, w, None, w, None),
        lambda: fastattn.feed_forward(x, w, None, w, None),
        lambda: fastattn.linear_cross_entropy(x, w, torch.tensor([1, 2])),
        lambda: fastattn.attention(q[None, None], q[None, None], q[None, None]),
        lambda: fastattn.rotary_embedding(q[None, None], x[:, :4], x[:, :4]),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"{dtype}"):
            call()


def test_plain_weights_keep_the_fused_path():
    linear = torch.nn.Linear(8, 8)
    assert is_plain(linear, torch.nn.Linear)
    with torch._subclasses.FakeTensorMode():
        assert is_plain(torch.nn.Linear(8, 8), torch.nn.Linear)
    assert is_plain(torch.nn.Linear(8, 8, device="meta"), torch.nn.Linear)
    torch.func.functional_call(linear, {"weight": torch.zeros(8, 8)}, (torch.zeros(1, 8),))
    seen = []

    class Looks(torch.nn.Module):
        def forward(self, x):
            seen.append(is_plain(linear, torch.nn.Linear))
            return linear(x)

    torch.func.functionalize(Looks())(torch.zeros(1, 8))
    torch.export.export(Looks(), (torch.zeros(1, 8),), strict=False)
    assert seen
    assert all(seen)
    linear.weight = torch.nn.Parameter(Half(linear.weight), requires_grad=False)
    assert not is_plain(linear, torch.nn.Linear)
