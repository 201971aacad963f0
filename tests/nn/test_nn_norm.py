"""LayerNorm and RMSNorm modules against torch.nn's."""

import pytest
import torch
from nn_oracle import compare, pair

from fastattn import nn

FLAGS = {
    "LayerNorm": [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}],
    "RMSNorm": [{}, {"elementwise_affine": False}, {"eps": 0.1}],
}
CASES = [(name, flags) for name, many in FLAGS.items() for flags in many]


@pytest.mark.parametrize(("name", "flags"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(v) or "default")
@pytest.mark.parametrize("dims", [(8,), (3, 8), (5, 3, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_matrix(name, flags, dims, dtype):
    ours, theirs = pair(name, dims, dtype=dtype, **flags)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, 3, 8, generator=generator, dtype=torch.float64).to(dtype)
    compare(ours, theirs, lambda module, x: module(x), {"x": x})


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_int_shape_and_autocast(name):
    ours, theirs = pair(name, 8)
    x = torch.randn(3, 8)
    compare(ours, theirs, lambda module, x: module(x), {"x": x}, autocast=True)
    assert ours.normalized_shape == (8,)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize(
    "strided", [lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[:1].expand(4, -1, -1)]
)
@pytest.mark.parametrize("dims", [(8,), (6, 8)])
def test_strided_input(name, strided, dims):
    x = strided(torch.randn(6, 6, 8))
    if tuple(x.shape[-len(dims) :]) != dims:
        x = x.transpose(0, 1)
    if tuple(x.shape[-len(dims) :]) != dims:
        dims = tuple(x.shape[-2:])
    ours, theirs = pair(name, dims)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_half_input_with_fp32_weights(name):
    ours, _ = pair(name, 8)
    x = torch.randn(3, 8)
    out = ours(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), ours(x.bfloat16().float()), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize(("dims", "shape"), [((8,), (2, 7)), ((5, 8), (2, 5, 7)), ((5, 8), (8,)), ((5, 8), (5, 2, 8))])
def test_wrong_last_dimensions(name, dims, shape):
    for affine in (True, False):
        with pytest.raises(RuntimeError, match=r"Given normalized_shape=.* expected input with shape"):
            getattr(nn, name)(dims, elementwise_affine=affine)(torch.randn(shape))
        with pytest.raises((RuntimeError, ValueError)):  # ValueError: RMSNorm on too few dimensions
            getattr(torch.nn, name)(dims, elementwise_affine=affine)(torch.randn(shape))


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize(("dims", "shape"), [((8,), (0, 8)), ((3, 8), (0, 3, 8)), ((3, 8), (2, 0, 3, 8))])
def test_empty(name, dims, shape):
    ours, theirs = pair(name, dims)
    assert ours(torch.randn(shape)).shape == theirs(torch.randn(shape)).shape == shape


def test_rms_eps_of_the_accumulator():
    """If eps is None, it is that of fp32 for half and fp32 inputs, and that of fp64 for fp64."""
    for dtype, eps in (
        (torch.float64, 2.220446049250313e-16),
        (torch.float32, 1.1920929e-07),
        (torch.bfloat16, 1.1920929e-07),
    ):
        x = torch.full((1, 4), 1e-4 if dtype != torch.float64 else 1e-8, dtype=dtype)
        expected = x.double() * (x.double().square().mean() + eps).rsqrt()
        ours = nn.RMSNorm(4, dtype=dtype)(x)
        torch.testing.assert_close(ours.double(), expected, rtol=float(torch.finfo(dtype).eps) * 4, atol=0)


def test_nested_input():
    """torch's stacks pass such inputs to their final norm."""
    sequences = [torch.randn(n, 8) for n in (3, 1, 4)]
    ours, theirs = pair("LayerNorm", 8)
    got = ours(torch.nested.nested_tensor(sequences)).unbind()
    for value, sequence in zip(got, sequences, strict=True):
        torch.testing.assert_close(value, theirs(sequence))


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_transforms_and_double_backward(name):
    ours, theirs = pair(name, 8, dtype=torch.float64)
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(torch.func.vmap(ours)(x), theirs(x))
    torch.testing.assert_close(
        torch.func.grad(lambda x: ours(x).square().sum())(x), torch.func.grad(lambda x: theirs(x).square().sum())(x)
    )
    assert torch.autograd.gradgradcheck(ours, x[:1, :2].detach().requires_grad_())


@pytest.mark.parametrize("requires_grad", [False, True])
def test_memory_format(requires_grad):
    """The output of LayerNorm is contiguous, as in torch. So is RMSNorm's, although torch keeps channels_last."""
    dense = torch.randn(2, 3, 4, 5, requires_grad=requires_grad)
    for x in (
        dense.to(memory_format=torch.channels_last), dense[None].to(memory_format=torch.channels_last_3d),
        dense.transpose(1, 2), dense.permute(3, 2, 1, 0), dense[..., ::2], dense[:1].expand(4, 3, 4, 5),
    ):  # fmt: skip
        for name, torch_contiguous in (("LayerNorm", True), ("RMSNorm", x.stride(1) != 1)):
            ours, theirs = pair(name, x.shape[-1])
            got, expected = ours(x), theirs(x)
            torch.testing.assert_close(got, expected)
            assert got.is_contiguous()
            assert expected.is_contiguous() == torch_contiguous


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_symbolic_trace_of_the_module_itself(name):
    ours, _ = pair(name, 8)
    traced, x = torch.fx.symbolic_trace(ours), torch.randn(3, 8)
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"]
    torch.testing.assert_close(traced(x), ours(x))
