"""Sums over very many numbers are as accurate as PyTorch's and do not depend on the number of threads."""

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import plain
from oracle import BACKWARD, assert_accurate, exact
from threads import same_bits

import fastattn
from fastattn import reference

KINDS = {"rand": torch.rand, "randn": torch.randn, "randn + 100": lambda *s, **o: torch.randn(*s, **o) + 100}


def draw(shape, kind="randn"):
    return KINDS[kind](shape, generator=torch.Generator().manual_seed(sum(shape)))


def results(function, inputs, grad):
    inputs = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.rand(o.shape, generator=torch.Generator().manual_seed(1)) for o in outputs] if grad is None else grad
    found = torch.autograd.grad(outputs, inputs, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)])
    return outputs, found


def check(ours, theirs, inputs, grad=None, skip=(), slack=0.0):
    """Our outputs and gradients against theirs in fp64, with their error as bound; `skip`: gradients left out."""
    found, truth, baseline = (
        results(f, i, grad) for f, i in ((ours, inputs), (theirs, exact(*inputs)), (theirs, inputs))
    )
    for number, values in enumerate(zip(found[0], truth[0], baseline[0], strict=True)):
        assert_accurate(*values, what=f"output {number}", slack=slack)
    for number, values in enumerate(zip(found[1], truth[1], baseline[1], strict=True)):
        if number not in skip:
            assert_accurate(*values, BACKWARD, what=f"gradient {number}", slack=slack)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 1000), (2, 4096), (2, 4097), (1, 65536), (1, 2**22), (2**17, 4)], ids=str)
def test_norms(shape, kind):
    """PyTorch's own test requires 1e-5 for 256·256·144 columns. A mean of 100 loses half an fp32 unit, which enters the
    gradient twice."""
    cols = shape[-1:]
    slack = 100 * torch.finfo(torch.float32).eps if "100" in kind else 0.0
    x, weight, bias = draw(shape, kind), draw(cols, "rand") + 0.5, draw(cols)
    check(fastattn.layer_norm, lambda x, w, b: F.layer_norm(x, cols, w, b), (x, weight, bias), slack=slack)
    check(lambda x, w: fastattn.rms_norm(x, w, 1e-6), lambda x, w: F.rms_norm(x, cols, w, 1e-6), (x, weight))


def test_a_column_that_begins_a_block_counts_once():
    for cols in (4095, 4096, 4097, 8191, 8192, 8193, 12288 + 17):
        x = draw((3, cols))
        torch.testing.assert_close(fastattn.layer_norm(x), F.layer_norm(x, (cols,)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_of_a_large_vocabulary(label_smoothing):
    x, weight, target = draw((3, 2)), draw((2**21, 2)), torch.tensor([0, 17, 2**21 - 1])
    options = {"label_smoothing": label_smoothing, "reduction": "none"}
    check(
        lambda x, w: fastattn.linear_cross_entropy(x, w, target, **options),
        lambda x, w: plain(x, w, None, target, **options),
        (x, weight),
    )


def test_bias_gradients_of_the_feed_forward_block():
    x, w1, b1, w2 = draw((2**17, 2), "rand"), draw((8, 2)), draw((8,)), draw((2, 8))
    check(
        lambda *a: fastattn.feed_forward(*a, None, activation="silu"),
        lambda *a: reference.feed_forward(*a, None, activation="silu"),
        (x, w1, b1, w2),
        skip=(1, 3),  # weight gradients come from products
    )


@pytest.mark.parametrize("bias_shape", [(1, 1, 1, 1), (1, 1, 256, 1), (1, 1, 1, 256), (1, 4, 1, 1), (1, 1, 256, 256)])
def test_a_bias_that_many_scores_share(bias_shape):
    """With a gradient of lse besides that of the output, because the sum over the keys would otherwise cancel."""
    q, k, v = (draw((16, 4, 256, 8)) * 0.5 for _ in range(3))
    check(
        lambda q, bias: fastattn.attention(q, k, v, bias=bias, return_lse=True),
        lambda q, bias: reference.attention(q, k.to(q.dtype), v.to(q.dtype), bias=bias),
        (q, draw(bias_shape)),
        skip=(0,),
    )


def test_a_sink_that_many_rows_share():
    q, k, v = draw((1, 1, 2**17, 8)), draw((1, 1, 4, 8)), draw((1, 1, 4, 8), "rand")
    check(
        lambda q, sink: fastattn.attention(q, k, v, sink=sink),
        lambda q, sink: reference.attention(q, k.to(q.dtype), v.to(q.dtype), sink=sink)[0],
        (q, draw((1,))),
        skip=(0,),
    )


def test_the_same_bits_for_any_number_of_threads():
    calls = {
        "norm": (lambda x, w: fastattn.layer_norm(x, w), (draw((2**14, 8)), draw((8,)))),
        "long norm": (lambda x, w: fastattn.layer_norm(x, w), (draw((3, 2**16)), draw((2**16,)))),
        "dbias": (lambda q, b: fastattn.attention(q, q, q, bias=b), (draw((4, 4, 100, 8)), draw((1, 1, 100, 1)))),
        "activation": (
            lambda x, b: fastattn.feed_forward(x, torch.eye(4), b, torch.eye(4), None), (draw((2**14, 4)), draw((4,)))
        ),
    }  # fmt: skip
    for function, inputs in calls.values():
        same_bits(lambda f=function, i=inputs: results(f, i, None), (1, 2, 3))
