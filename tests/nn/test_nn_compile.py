"""torch.compile(fullgraph=True), torch.export, functorch transforms and higher derivatives."""

import copy

import pytest
import torch
from nn_oracle import pair, slow_path

from fastattn import nn

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own deprecation warnings

E, H, FF, N, L = 16, 4, 24, 2, 5


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(module):
    return torch.compile(module, fullgraph=True, backend="aot_eager")


def causal_mask(length=L):
    return torch.nn.Transformer.generate_square_subsequent_mask(length)


def assert_same_gradients(module, call):
    """Compare outputs and parameter gradients of call(module) and of call(compiled module)."""
    twin = copy.deepcopy(module)
    expected, got = call(module), call(compiled(twin))
    torch.testing.assert_close(got, expected)
    expected.sum().backward()
    got.sum().backward()
    for (name, p), q in zip(module.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)


@pytest.mark.parametrize(("is_causal", "masked"), [(None, True), (True, True), (True, False), (False, True)])
def test_encoder(is_causal, masked):
    layer = nn.TransformerEncoderLayer(E, H, FF, 0.0, batch_first=True, norm_first=masked)
    module, x = nn.TransformerEncoder(layer, 1, nn.LayerNorm(E)), torch.randn(N, L, E)
    mask = causal_mask() if masked else None
    padding = torch.arange(L) >= torch.tensor([5, 3])[:, None]
    assert_same_gradients(module, lambda m: m(x, mask, padding, is_causal=is_causal))


@pytest.mark.parametrize("is_causal", [None, True])
def test_decoder_and_transformer(is_causal):
    module = nn.Transformer(E, H, 1, 1, FF, 0.0, norm_first=True)
    src, tgt = torch.randn(L + 1, N, E), torch.randn(L, N, E)
    mask = causal_mask()
    assert_same_gradients(module, lambda m: m(src, tgt, tgt_mask=mask, tgt_is_causal=is_causal))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("is_causal", [True, False])
def test_attention(need_weights, is_causal):
    module, x = nn.MultiheadAttention(E, H, batch_first=True), torch.randn(N, L, E)
    assert_same_gradients(
        module, lambda m: sum(t.sum() for t in m(x, x, x, None, need_weights, is_causal=is_causal) if t is not None)
    )


def test_training_with_dropout():
    layer = nn.TransformerEncoderLayer(E, H, FF, 0.5, batch_first=True)
    x, fast = torch.randn(N, L, E), compiled(layer)
    torch.manual_seed(1)
    first = fast(x)
    second = fast(x)
    torch.manual_seed(1)
    torch.testing.assert_close(fast(x), first)
    assert not torch.allclose(first, second)
    first.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_other_sequence_lengths_do_not_break_the_graph():
    layer = nn.TransformerEncoderLayer(E, H, FF, 0.0, batch_first=True)
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 7):
        x = torch.randn(N, length, E)
        torch.testing.assert_close(fast(x, is_causal=True), layer(x, is_causal=True))


@pytest.mark.parametrize("name", ["TransformerEncoder", "Transformer", "MultiheadAttention"])
def test_export(name):
    x = torch.randn(N, L, E)
    if name == "MultiheadAttention":
        module, inputs, options = nn.MultiheadAttention(E, H, batch_first=True), (x, x, x), {"need_weights": False}
    elif name == "Transformer":
        module, inputs, options = nn.Transformer(E, H, 1, 1, FF, batch_first=True), (x, x), {"tgt_is_causal": True}
    else:
        layer = nn.TransformerEncoderLayer(E, H, FF, batch_first=True)
        module, inputs, options = nn.TransformerEncoder(layer, 2), (x, causal_mask()), {}
    module.eval()
    program = torch.export.export(module, inputs, options)
    expected, got = module(*inputs, **options), program.module()(*inputs, **options)
    torch.testing.assert_close(got, expected)


def test_vmap_over_attention():
    ours, theirs = pair("MultiheadAttention", E, H, dtype=torch.float64)
    x = torch.randn(3, L, N, E, dtype=torch.float64)
    for need_weights in (False, True):
        got = torch.func.vmap(lambda x, w=need_weights: ours(x, x, x, need_weights=w)[0])(x)
        torch.testing.assert_close(got, torch.stack([theirs(t, t, t)[0] for t in x]))


def test_func_grad_over_encoder():
    ours, theirs = pair("TransformerEncoderLayer", E, H, FF, 0.0, dtype=torch.float64)
    x, mask = torch.randn(L, N, E, dtype=torch.float64), causal_mask().double()

    def gradients(module):
        def loss(parameters):
            return torch.func.functional_call(module, parameters, (x, mask)).square().sum()

        return torch.func.grad(loss)(dict(module.named_parameters()))

    with slow_path():
        expected = gradients(theirs)
    for name, value in gradients(ours).items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_forward_mode():
    module = nn.TransformerEncoderLayer(E, H, FF, 0.0, "gelu", dtype=torch.float64)
    x, direction = torch.randn(L, N, E, dtype=torch.float64), torch.randn(L, N, E, dtype=torch.float64)
    _, tangent = torch.func.jvp(module, (x,), (direction,))
    step = 1e-6
    numeric = (module(x + step * direction) - module(x - step * direction)) / (2 * step)
    torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("need_weights", [False, True])
def test_double_backward(dtype, need_weights):
    """A gradient penalty, which is the gradient of the norm of a gradient, against torch's unfused attention."""
    ours, theirs = pair("MultiheadAttention", E, H, dtype=dtype)
    x = torch.randn(L, N, E, dtype=dtype, requires_grad=True)

    def penalty(module, need_weights):
        out = module(x, x, x, need_weights=need_weights)[0]
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), list(module.parameters()), allow_unused=True)

    for got, expected in zip(penalty(ours, need_weights), penalty(theirs, True), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3 if dtype == torch.float32 else 1e-8, atol=1e-3)


def test_double_backward_of_a_layer():
    layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0, "gelu", norm_first=True, dtype=torch.float64)
    x = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize(("norm_first", "is_causal"), [(True, True), (False, False)])
def test_packed_sequences(norm_first, is_causal):
    layer = nn.TransformerEncoderLayer(E, H, FF, 0.0, batch_first=True, norm_first=norm_first)
    x, cu_seqlens = torch.randn(9, E), torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    packed = layer.forward_packed(x, cu_seqlens, 5, is_causal)
    torch.testing.assert_close(packed[:4], layer(x[None, :4], is_causal=is_causal)[0])
    torch.testing.assert_close(packed[4:], layer(x[None, 4:], is_causal=is_causal)[0])
    forward = torch.compile(layer.forward_packed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(forward(x, cu_seqlens, 5, is_causal), packed)
    layer.linear1.register_forward_hook(lambda module, args, out: 2 * out)  # then the children are called
    slow = layer.forward_packed(x, cu_seqlens, 5, is_causal)
    torch.testing.assert_close(slow[4:], layer(x[None, 4:], is_causal=is_causal)[0])
    assert not torch.allclose(slow, packed)
