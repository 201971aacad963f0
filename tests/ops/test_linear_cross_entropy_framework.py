"""linear_cross_entropy within PyTorch: compiled, under autocast and transforms, differentiated twice, refused."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import arguments, gradients, plain
from oracle import exact
from torch.testing import assert_close

import fastattn
from fastattn import reference

OP = "linear_cross_entropy"


def test_opcheck(raw_backend, device, interpreted):
    cross_entropy = getattr(torch.ops.fastattn.cross_entropy_fwd, raw_backend)
    whole = getattr(torch.ops.fastattn.linear_cross_entropy_fwd, raw_backend)
    for dtype in (torch.float32, torch.float16 if interpreted else torch.bfloat16):
        x, weight, bias, target = (t.detach() for t in arguments(6, 4, 12, dtype, biased=True, device=device))
        dloss = torch.randn(6, device=device)
        torch.library.opcheck(cross_entropy, (x @ weight.t(), target, dloss, -100, 0.1, 0.1, 2.0, True))
        torch.library.opcheck(cross_entropy, (x @ weight.t(), target, None, -100, 0.0, 0.0, 0.0, False))
        options = (-100, 0.1, 0.1, 0.0, 4)
        torch.library.opcheck(whole, (x, weight, bias, target, dloss, *options, True, True, True))
        torch.library.opcheck(whole, (x, weight, None, target, None, *options, False, False, False))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic, reduction, device):
    torch._dynamo.reset()

    def step(x, weight, bias, target):
        return fastattn.linear_cross_entropy(
            x, weight, target, bias=bias, softcap=5.0, label_smoothing=0.1, reduction=reduction, chunk_size=4
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (10, 13):
        args = arguments(tokens, 8, 30, biased=True, device=device)
        results = []
        for f in (step, compiled):
            loss = f(*args)
            results.append((loss, *gradients(loss, args[:3], torch.ones_like(loss))))
        assert_close(results[1], results[0])


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_inductor(device):
    torch._dynamo.reset()
    args = arguments(20, 8, 30, device=device)[:2]
    target = arguments(20, 8, 30, device=device)[3]
    compiled = torch.compile(lambda x, w: fastattn.linear_cross_entropy(2 * x, w, target), fullgraph=True)
    loss, expected = compiled(*args), fastattn.linear_cross_entropy(2 * args[0], args[1], target)
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, args), torch.autograd.grad(expected, args))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, device):
    """Products in the autocast dtype, the loss in fp32, as F.linear and F.cross_entropy under autocast."""
    x, weight, bias, target = arguments(12, 8, 30, biased=True, device=device)
    with torch.autocast(device, dtype=dtype):
        loss = fastattn.linear_cross_entropy(x, weight, target, bias=bias)
        expected = F.cross_entropy(F.linear(x, weight, bias), target)
        with_double = fastattn.linear_cross_entropy(x.double(), weight.double(), target)
    assert loss.dtype == expected.dtype == torch.float32
    assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    tolerance = 8 * torch.finfo(dtype).eps
    grads = torch.autograd.grad(loss, (x, weight, bias))
    assert all(g.dtype == torch.float32 for g in grads)
    assert_close(grads, torch.autograd.grad(expected, (x, weight, bias)), rtol=tolerance, atol=tolerance)
    assert with_double.dtype == torch.float64


def test_half_precision_gradients_do_not_underflow(device):
    """A mean over many tokens with a large vocabulary: the softmax over their number is below the smallest fp16."""
    x, weight, _, target = arguments(2000, 4, 4000, torch.float16, device=device, scale=0.1)
    loss = fastattn.linear_cross_entropy(x, weight, target, chunk_size=500)
    (ours,) = torch.autograd.grad(loss, weight, torch.tensor(2.0**12, device=device))
    weight64 = exact(weight)
    (expected,) = torch.autograd.grad(2.0**12 * plain(x.double(), weight64, None, target), weight64)
    assert ((ours.double() - expected).norm() / expected.norm()).item() < 2e-3


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none", "softcap": 2.0}, {"label_smoothing": 0.2, "z_loss": 0.1}]
)
def test_gradcheck_of_the_reference(options):
    x, weight, bias, target = arguments(5, 3, 6, biased=True)
    inputs = exact(x, weight, bias)
    inputs = tuple(t.requires_grad_() for t in inputs)

    def function(x, weight, bias):
        return fastattn.linear_cross_entropy(x, weight, target, bias=bias, **options)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_of_the_fp32_op(reduction, device):
    args = arguments(6, 4, 10, biased=True, device=device)
    second = []
    for function, inputs in (
        (fastattn.linear_cross_entropy, args[:3]),
        (reference.linear_cross_entropy, exact(*args[:3])),
    ):
        x, weight, bias = inputs
        loss = function(x, weight, args[3], bias=bias, reduction=reduction).sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for ours, wanted in zip(*second, strict=True):
        assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-5)


def test_function_transforms_and_forward_mode_go_to_the_reference():
    x, weight, _, target = arguments(6, 4, 10)
    (dx,) = torch.autograd.grad(fastattn.linear_cross_entropy(x, weight, target), x)
    weight = weight.detach()

    def function(x):
        return fastattn.linear_cross_entropy(x, weight, target)

    assert_close(torch.func.grad(function)(x.detach()), dx)
    tangent = torch.randn(6, 4)
    _, dual = torch.func.jvp(function, (x.detach(),), (tangent,))
    assert_close(dual, (dx * tangent).sum())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.tensor(1.0)}, r"at least one dimension, got torch.float32 \(\)"),
        ({"x": torch.ones(3, 4, dtype=torch.int64)}, r"floating-point tensor .* got torch.int64"),
        ({"weight": torch.ones(4)}, r"weight must have shape \(vocab, d_model\), got \(4,\)"),
        ({"weight": torch.ones(9, 5)}, r"weight must have shape \(9, 4\), .* got \(9, 5\)"),
        ({"weight": torch.ones(9, 4).half()}, r"weight must have the dtype of x, torch.float32, got torch.float16"),
        ({"weight": torch.ones(9, 4, device="meta")}, r"weight must be on the device of x, cpu, got meta"),
        ({"bias": torch.ones(4)}, r"bias must have shape \(9,\), .* got \(4,\)"),
        ({"target": torch.zeros(2, dtype=torch.int64)}, r"target must have shape \(3,\), .* got \(2,\)"),
        ({"target": torch.zeros(3)}, r"target must be int64 or int32, got torch.float32"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be between 0 and 1, got 1.5"),
        ({"z_loss": -1.0}, r"z_loss must be 0 or a positive number, got -1.0"),
        ({"softcap": float("nan")}, r"softcap must be 0 or a positive number, got nan"),
        ({"reduction": "avg"}, r"reduction must be one of none, mean, sum, got 'avg'"),
        ({"chunk_size": 0}, r"chunk_size must be at least 1, got 0"),
        ({"backend": "cuda"}, r"backend must be one of native, triton, reference or auto, got 'cuda'"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(changes, message):
    given = {"x": torch.ones(3, 4), "weight": torch.ones(9, 4), "target": torch.zeros(3, dtype=torch.int64)} | changes
    with pytest.raises(ValueError, match=message):
        fastattn.linear_cross_entropy(**given)


@pytest.mark.parametrize("wrong", [9, -1, 2**31 - 1])
def test_target_out_of_range(wrong, backend, device):
    """An error if the check costs no synchronisation, otherwise a loss of NaN."""
    inputs = torch.ones(3, 4, device=device), torch.ones(9, 4, device=device)
    target = torch.tensor([0, wrong, -100], device=device)
    if device == "cpu":
        with pytest.raises(IndexError, match=str(wrong)):
            fastattn.linear_cross_entropy(*inputs, target)
    elif backend != "reference":  # an assertion of PyTorch on the device, after which the device is unusable
        assert fastattn.linear_cross_entropy(*inputs, target).isnan()


def test_named_backend_that_cannot_serve_raises_and_explain_says_why():
    args = torch.ones(3, 4).double(), torch.ones(9, 4).double(), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="cannot serve"):
        fastattn.linear_cross_entropy(*args, backend="native")
    assert "reference: runs" in fastattn.explain(OP, *args)
