"""Autocast casts the inputs of an op or layer and changes nothing inside, wherever forward and backward run.

All combinations: the forward in a region, in an island with enabled=False or outside, the backward inside or outside,
and gradients of order 1 and 2. An op gives the bits of explicit casts; a layer is as near to fp64 as torch.nn's.
"""

import itertools
import shutil

import pytest
import torch
from nn_oracle import compare, pair, region
from op_cases import OPS, leaf
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn import nn, reference
from fastattn.ops._backends import use_backend

FORWARD, BACKWARD = ("in", "island", "out"), ("in", "out")
HALVES = (torch.bfloat16, torch.float16)


CAST = [name for name, (_, _, cast) in OPS.items() if cast]


def results(function, inputs, forward, backward, half=torch.bfloat16, orders=(1, 2)):
    """Outputs, and gradients of the first order and the second, of leaves `inputs`."""
    torch.manual_seed(0)  # the same dropout
    with region(forward, half):
        outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    scalar = sum(torch.where(o.isfinite(), o.float(), 0.0).square().mean() for o in outputs)
    found = list(outputs)
    with region(backward, half):
        for order in orders:
            grads = torch.autograd.grad(scalar, inputs, create_graph=order == 2, retain_graph=True, allow_unused=True)
            if order == 2:
                penalty = sum(g.square().mean() for g in grads if g is not None)
                grads = torch.autograd.grad(penalty, inputs, allow_unused=True)
            found += [g for g in grads if g is not None]
    return [t.detach() for t in found]


def assert_same_bits(found, expected, what):
    assert [t.dtype for t in found] == [t.dtype for t in expected], what
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), f"{what}: tensor {number} differs by {(a.double() - b.double()).abs().max():.3g}"


@pytest.mark.parametrize("name", OPS)
def test_an_op_gives_the_bits_of_explicit_casts(name, backend, interpreted):
    function, inputs, cast = OPS[name]
    if interpreted and name not in ("attention", "feed_forward", "linear_cross_entropy, none", "layer_norm"):
        pytest.skip("the interpreter is slow: an op with its own backward each, as the products are not Triton's here")
    for half in HALVES[interpreted:]:

        def explicit(*tensors, half=half):
            return function(*(t.to(half) if i < cast else t for i, t in enumerate(tensors)))

        orders = (1,) if interpreted else (1, 2)  # order 2 runs on the reference for every backend
        expected = {
            forward: results(explicit if forward == "in" else function, inputs, "out", "out", half, orders)
            for forward in ("in", "out")
        }
        for forward, backward in itertools.product(FORWARD, BACKWARD):
            found = results(function, inputs, forward, backward, half, orders)
            assert_same_bits(
                found, expected["in" if forward == "in" else "out"], f"{half}, forward {forward}, backward {backward}"
            )


@pytest.mark.parametrize("name", CAST)
def test_fp64_is_left_alone(name):
    function, inputs, _ = OPS[name]
    inputs = [t.detach().double().requires_grad_() for t in inputs]
    assert_same_bits(results(function, inputs, "in", "in"), results(function, inputs, "out", "out"), name)


def test_the_reference_computes_in_fp32():
    """It does not cast its inputs and is the specification inside a region too."""
    q, k, v, bias = OPS["attention"][1]
    x, w1, b1, w2, b2, *_ = OPS["feed_forward"][1]
    h, weight, logit_bias = OPS["linear_cross_entropy"][1]
    for function, inputs in (
        (lambda *a: reference.attention(*a[:3], bias=a[3]), (q, k, v, bias)),
        (reference.feed_forward, (x, w1, b1, w2, b2)),
        (reference.feed_forward, (x[0].detach().requires_grad_(), w1, b1, w2, b2)),
        (lambda h, w, b: reference.linear_cross_entropy(h, w, torch.arange(6), bias=b), (h, weight, logit_bias)),
    ):
        assert_same_bits(results(function, inputs, "in", "in"), results(function, inputs, "out", "out"), "reference")


def test_decode_gives_the_bits_of_explicit_casts(backend):
    q, k_cache, v_cache = (leaf(1, 2, 20, 8, scale=4.0, seed=seed).detach() for seed in range(3))
    lengths = torch.tensor([17], dtype=torch.int32)
    expected = fastattn.attention_decode(q[:, :, :1], k_cache, v_cache, cache_seqlens=lengths, return_lse=True)
    for kind in FORWARD:
        with region(kind):
            found = fastattn.attention_decode(q[:, :, :1], k_cache, v_cache, cache_seqlens=lengths, return_lse=True)
        assert_same_bits(found, expected, kind)


@pytest.mark.parametrize("name", CAST)
def test_function_transforms(name):
    """Their products are the reference's, and the intermediate results of torch.func.grad and jvp are not rounded."""
    function, inputs, cast = OPS[name]
    if "dropout" in name or "packed" in name:
        pytest.skip("torch.func refuses to draw the random state, and to read lengths")
    inputs = [t.detach() for t in inputs]

    def scalar(*tensors):
        outputs = function(*tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum(o.float().square().mean() for o in outputs)

    def everything(*tensors):
        argnums = tuple(range(len(tensors)))
        return *torch.func.grad(scalar, argnums)(*tensors), *torch.func.jvp(scalar, tensors, tensors)

    def explicit(*tensors):
        return everything(*(t.to(torch.bfloat16) if i < cast else t for i, t in enumerate(tensors)))

    expected = [t.float() for t in explicit(*inputs)]
    with region("in"):
        found = everything(*inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=2e-2, atol=2e-2 * b.abs().max().item())
    with region("island"):
        assert_same_bits(everything(*inputs), everything(*inputs), name)


@pytest.mark.parametrize("inside", [False, True], ids=["region around", "region in the graph"])
@pytest.mark.parametrize("choice", ["native", "reference"])
@pytest.mark.parametrize("name", ["attention", "feed_forward", "linear_cross_entropy, none"])
def test_compiled_in_one_graph(name, choice, inside):
    function, inputs, _ = OPS[name]
    for forward in ("in", "island"):

        def graph(*tensors, forward=forward):
            if not inside:
                return function(*tensors)
            with torch.autocast("cpu", torch.bfloat16):  # Dynamo cannot trace a context manager made from a generator
                if forward == "in":
                    return function(*tensors)
                with torch.autocast("cpu", enabled=False):
                    return function(*tensors)

        torch._dynamo.reset()
        with use_backend(choice):
            compiled = torch.compile(graph, backend="aot_eager", fullgraph=True)
            found = results(compiled, inputs, "out" if inside else forward, "out", orders=(1,))
            expected = results(function, inputs, forward, "out", orders=(1,))
        tolerance = 4 * torch.finfo(torch.bfloat16 if forward == "in" else torch.float32).eps
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_compiled_backward_in_a_region():
    """Inductor calls no product that autocast would cast."""
    function, inputs, _ = OPS["feed_forward"]
    torch._dynamo.reset()
    found = results(torch.compile(function, fullgraph=True), inputs, "out", "in", orders=(1,))
    for a, b in zip(found, results(function, inputs, "out", "out", orders=(1,)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", CAST)
def test_exported(name, grad):
    """An exported program has the casts of the region in which it was traced, and works if gradients are recorded."""
    function, inputs, _ = OPS[name]
    if "dropout" in name:
        pytest.skip("an exported graph draws other random numbers")
    if "packed" in name:
        pytest.skip("export does not read lengths")

    class Model(torch.nn.Module):
        def forward(self, *tensors):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*tensors)

    with torch.set_grad_enabled(grad):
        found = torch.export.export(Model(), tuple(inputs)).module()(*inputs)
        expected = Model()(*inputs)
    for a, b in zip(*(o if isinstance(o, tuple) else (o,) for o in (found, expected)), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", OPS)
def test_fake_and_meta_tensors(name):
    function, inputs, _ = OPS[name]
    if "packed" in name:
        pytest.skip("fake lengths cannot be read")
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t) for t in inputs]
    for forward, backward in itertools.product(FORWARD, BACKWARD):
        expected = [(t.shape, t.dtype) for t in results(function, inputs, forward, "out", orders=(1,))]
        with mode:
            found = results(function, fake, forward, backward, orders=(1,))
        assert [(t.shape, t.dtype) for t in found] == expected
        if name in ("attention", "feed_forward", "layer_norm", "rms_norm"):  # the other ops have tensors of their own
            meta = [t.detach().to("meta").requires_grad_() for t in inputs]
            assert all(t.is_meta for t in results(function, meta, forward, backward, orders=(1,)))


LAYERS = {
    "MultiheadAttention": (
        lambda d, ff: pair("MultiheadAttention", d, 4, batch_first=True), lambda m, x: m(x, x, x, need_weights=False)[0]
    ),
    "MultiheadAttention with weights": (
        lambda d, ff: pair("MultiheadAttention", d, 4, batch_first=True), lambda m, x: m(x, x, x)
    ),
    "post-norm encoder": (
        lambda d, ff: pair("TransformerEncoderLayer", d, 4, ff, 0.0, batch_first=True), lambda m, x: m(x)
    ),
    "pre-norm encoder": (
        lambda d, ff: pair("TransformerEncoderLayer", d, 4, ff, 0.0, "gelu", batch_first=True, norm_first=True),
        lambda m, x: m(x),
    ),
    "decoder": (
        lambda d, ff: pair("TransformerDecoderLayer", d, 4, ff, 0.0, batch_first=True), lambda m, x: m(x, x.flip(0))
    ),
    "LayerNorm": (lambda d, ff: pair("LayerNorm", d), lambda m, x: m(x)),
    "RMSNorm": (lambda d, ff: pair("RMSNorm", d), lambda m, x: m(x)),
}  # fmt: skip


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_as_near_to_fp64_as_torchs(name, size):
    build, call = LAYERS[name]
    shape, d_ff = ((3, 7, 16), 40) if size == "small" else ((8, 32, 128), 256)  # 2^23 multiplications
    ours, theirs = build(shape[-1], d_ff)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for forward, backward in itertools.product(FORWARD, BACKWARD):
        compare(ours, theirs, call, {"x": x}, regions=(forward, backward))
        if size == "small":
            with sdpa_kernel(SDPBackend.MATH):  # torch's other kernels have no double backward
                compare(ours, theirs, call, {"x": x}, regions=(forward, backward), order=2)


@pytest.mark.parametrize("name", ["post-norm encoder", "pre-norm encoder", "decoder"])
def test_inputs_in_the_other_half_precision(name):
    """The sum of float16 and bfloat16 is float32, as in torch.nn."""
    build, call = LAYERS[name]
    ours, theirs = build(16, 40)
    for half, other in itertools.permutations(HALVES):
        x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1)).to(other)
        with region("in", half):
            found, expected = call(ours, x), call(theirs, x)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("scale", [1, 3, 6])
def test_attention_weights_of_large_inputs_sum_to_one(scale, half):
    torch.manual_seed(0)
    module, x = nn.MultiheadAttention(64, 4, batch_first=True), scale * torch.randn(2, 32, 64)
    with region("in", half):
        weights = module(x, x, x, average_attn_weights=False)[1]
    assert weights.max() <= 1
    torch.testing.assert_close(weights.float().sum(-1), torch.ones(2, 4, 32), rtol=0, atol=32 * torch.finfo(half).eps)
