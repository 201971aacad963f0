"""Computations on DTensors in two processes, compared with one process on plain tensors.

`main` runs all CASES in two processes of gloo and writes the failures of each process, by case.
A placement is written R, S0, S1, ... or P; those of a call as "x=S0 weight=S1". Inputs that are not named are R.
"""

import copy
import datetime
import importlib
import json
import re
import sys
import tempfile
import traceback
import warnings

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import nn

CASES = {}  # name -> function without arguments, run in every process


def case(name, *arguments):
    """Register a function, which is called with `arguments`, as the case of this name."""

    def register(function):
        assert name not in CASES, name
        CASES[name] = lambda: function(*arguments)
        return function

    return register


def mesh(*shape):
    """The mesh of both processes, created once."""
    from torch.distributed.tensor import init_device_mesh

    shape = shape or (2,)
    if shape not in _meshes:
        names = ("dp", "tp") if len(shape) == 2 else ("tp",)
        _meshes[shape] = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return _meshes[shape]


_meshes = {}
_linear_takes = {}


def placement(text):
    from torch.distributed.tensor import Partial, Replicate, Shard

    return Shard(int(text[1:])) if text[0] == "S" else Partial() if text == "P" else Replicate()


def distribute(tensor, *places, on=None):
    """A DTensor with memory of its own and the given placements, R by default."""
    from torch.distributed.tensor import distribute_tensor

    on = on or mesh()
    placements = [placement(text) for text in places or ("R",) * on.ndim]
    return distribute_tensor(tensor.detach().clone(), on, placements).requires_grad_(tensor.requires_grad)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_close(found, expected, label="", rtol=1e-4, atol=2e-5):
    torch.testing.assert_close(whole(found), whole(expected), rtol=rtol, atol=atol, msg=lambda text: f"{label}: {text}")


def same_gradients(found, expected):
    """Compare the gradients of two modules."""
    expected = dict(expected.named_parameters())
    for name, parameter in found.named_parameters():
        assert_close(parameter.grad, expected[name].grad, name)


def tensors_of(**shapes):
    """Tensors of random numbers that require gradients and are equal in all processes."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}


def compare(function, tensors, plan, on=None):
    """Check that outputs and gradients of a function of DTensors are those of plain tensors; return the outputs."""
    plain = {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    places = dict(entry.split("=") for entry in plan.split())
    sharded = {
        name: distribute(t, *places[name].split(","), on=on) if name in places else distribute(t, on=on)
        for name, t in tensors.items()
    }
    outputs = []
    for inputs in (plain, sharded):
        found = function(**inputs)
        outputs.append(found if isinstance(found, tuple) else (found,))
    generator = torch.Generator().manual_seed(1)
    losses = [0, 0]
    for expected, found in zip(*outputs, strict=True):
        assert_close(found, expected, "output")
        weight = torch.randn(expected.shape, generator=generator)
        losses[0] = losses[0] + (expected * weight).sum()
        losses[1] = losses[1] + (found * distribute(weight, on=on)).sum()
    for loss in losses:
        loss.backward()
    for name, t in plain.items():
        if t.grad is not None:
            assert_close(sharded[name].grad, t.grad, f"gradient of {name}")
    return outputs[1]


def places_of(tensor):
    return ",".join(f"S{p.dim}" if p.is_shard() else "P" if p.is_partial() else "R" for p in tensor.placements)


# ---------------------------------------------------------------------------------------------------------------------
# ops: (function, shapes of its float tensors, [plan -> placements of the first output])

X = {"x": (4, 6, 8)}
QKV = {"q": (4, 4, 6, 8), "k": (4, 2, 6, 8), "v": (4, 2, 6, 8)}
WEIGHTS = {"w1": (16, 8), "b1": (16,), "w2": (8, 16), "b2": (8,)}
COLWISE = "w1=S0 b1=S0 w2=S1"
GATED = WEIGHTS | {"w_gate": (16, 8), "b_gate": (16,)}
TARGET = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(2))
TARGET[0, :4] = -100
COS, SIN = (f(torch.outer(torch.arange(9.0), torch.tensor([1.0, 0.1, 0.01]))) for f in (torch.cos, torch.sin))
POSITIONS = torch.randint(9, (4, 6), generator=torch.Generator().manual_seed(3))
ENDS = torch.tensor([0, 2, 6], dtype=torch.int32)


def norm_with_everything(x, residual, weight, bias, x_bias):
    return fastattn.layer_norm(x, weight, bias, x_bias=x_bias, residual=residual, return_residual=True)


def loss(reduction):
    def function(x, weight, bias):
        target = TARGET if type(x) is torch.Tensor else distribute(TARGET)
        return fastattn.linear_cross_entropy(x, weight, target, bias=bias, reduction=reduction, z_loss=0.1)

    return function


def rotated(positions):
    def function(x):
        return fastattn.rotary_embedding(x, COS, SIN, positions=positions)

    return function


def packed(q, k, v):
    lengths, slopes = torch.tensor([2, 3], dtype=torch.int32), torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 2)
    return fastattn.attention(
        q, k, v, cu_seqlens_q=ENDS, cu_seqlens_k=ENDS, causal=True, seqlens_k=lengths, alibi_slopes=slopes,
        return_lse=True,
    )  # fmt: skip


def padded(q, k, v):
    lengths, slopes = torch.tensor([2, 3, 0, 6], dtype=torch.int32), torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 4)
    mask = torch.ones(6, 6, dtype=torch.bool).tril_(2)
    return fastattn.attention(q, k, v, mask=mask, seqlens_k=lengths, alibi_slopes=slopes, return_lse=True)


def attend(**options):
    return lambda **tensors: fastattn.attention(**tensors, **options)


_NORM = {"x": (4, 6, 8), "weight": (8,), "bias": (8,)}
_LOSS = {"x": (4, 6, 8), "weight": (11, 8), "bias": (11,)}
_ROTARY = {"x": (4, 2, 6, 8)}
_EXTRAS = QKV | {"bias": (1, 4, 6, 6), "sink": (4,)}
_HEADS = {"q=S0 k=S0 v=S0": "S0", "q=S1 k=S1 v=S1": "S1", "q=S1": "S1", "k=S1 v=S1": "S1", "q=S3": "R", "q=P": "R"}
OPS = {
    "layer_norm": (fastattn.layer_norm, _NORM, {"": "R", "x=S0": "S0", "x=S1": "S1", "x=S2": "R", "weight=S0": "R"}),
    "rms_norm": (fastattn.rms_norm, {"x": (5, 3, 8), "weight": (8,)}, {"x=S0": "S0", "x=S1": "S1"}),  # uneven parts
    "add and norm": (
        norm_with_everything,
        _NORM | {"residual": (4, 6, 8), "x_bias": (8,)},
        {"x=S1 residual=S1": "S1", "residual=S0": "S0", "x=S2 residual=S1": "S1"},
    ),
    "attention": (attend(return_lse=True), QKV, _HEADS | {"q=S2 k=S2 v=S2": "S2", "q=S2": "S2"}),
    "attention, causal": (attend(causal=True), QKV, _HEADS | {"q=S2 k=S2 v=S2": "R"}),
    "attention, bias and sink": (
        attend(window=(2, 1)), _EXTRAS, {"q=S0": "S0", "q=S1 bias=S1 sink=S0": "S1", "q=S2 bias=S2": "R"},
    ),
    "attention, one key head": (
        attend(), {"q": (2, 3, 6, 8), "k": (2, 1, 6, 8), "v": (2, 1, 6, 8)}, {"q=S1": "S1", "q=S1 k=S0 v=S0": "S1"},
    ),
    "attention, heads that do not fit": (attend(), {"q": (3, 6, 4, 8), "k": (3, 3, 4, 8), "v": (3, 3, 4, 8)},
                                         {"q=S1": "R", "q=S0": "S0"}),
    "attention, packed": (
        packed, {"q": (6, 4, 8), "k": (6, 2, 8), "v": (6, 2, 8)}, {"q=S1 k=S1 v=S1": "S1", "q=S0 k=S0 v=S0": "R"},
    ),
    "attention, lengths, slopes and a mask": (padded, QKV, _HEADS | {"q=S2": "R"}),
    "scaled_dot_product_attention": (
        lambda q, k, v: fastattn.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True),
        QKV, {"q=S0 k=S0 v=S0": "S0", "q=S1 k=S1 v=S1": "S1"},
    ),
    "scaled_dot_product_attention, five dimensions": (
        fastattn.scaled_dot_product_attention,
        dict.fromkeys(("query", "key", "value"), (2, 2, 2, 4, 8)), {"query=S0 key=S0 value=S0": "S0"},
    ),
    "feed_forward": (fastattn.feed_forward, X | WEIGHTS,
                     {"x=S0": "S0", "x=S1": "S1", "x=S2": "R", COLWISE: "P", f"x=S1 {COLWISE}": "P", "w2=S1": "P"}),
    "feed_forward, gated": (fastattn.feed_forward, X | GATED, {"x=S1": "S1", f"{COLWISE} w_gate=S0 b_gate=S0": "P"}),
    "feed_forward, recomputed": (
        lambda **tensors: fastattn.feed_forward(**tensors, recompute=True), X | WEIGHTS, {"x=S0": "S0", COLWISE: "P"},
    ),
    **{
        f"linear_cross_entropy, {reduction}": (
            loss(reduction), _LOSS, {"x=S0": of_rows, "x=S1": of_rows.replace("0", "1"), "weight=S0": "R", "": "R"},
        )
        for reduction, of_rows in (("mean", "R"), ("sum", "P"), ("none", "S0"))
    },
    "rotary_embedding": (rotated(None), _ROTARY, {"x=S0": "S0", "x=S1": "S1", "x=S2": "S2", "x=S3": "R"}),
    "rotary_embedding, later": (rotated(3), _ROTARY, {"x=S1": "S1", "x=S2": "S2"}),
    "rotary_embedding, positions": (rotated(POSITIONS), _ROTARY, {"x=S0": "S0", "x=S1": "S1", "x=S2": "S2"}),
    "rotary_embedding, packed": (rotated(POSITIONS[0]), {"x": (6, 4, 8)}, {"x=S0": "S0", "x=S1": "S1"}),
}  # fmt: skip


def run_op(function, shapes, plans, backend):
    with fastattn.use_backend(backend):
        for plan, expected in plans.items():
            outputs = compare(function, tensors_of(**shapes), plan)
            assert places_of(outputs[0]) == expected, f"{plan}: expected {expected}, got {places_of(outputs[0])}"


for _name, _arguments in OPS.items():
    for _backend in ("auto", "reference"):
        case(f"{_name} ({_backend})", *_arguments, _backend)(run_op)


@case("a mesh of two dimensions")
def on_two_dimensions():
    for shape in ((1, 2), (2, 1)):
        for plan in ("x=S0,S1", "x=S0,S0", "x=S0,R residual=R,S1", "x=R,S2"):
            tensors = tensors_of(**_NORM, residual=(4, 6, 8), x_bias=(8,))
            compare(norm_with_everything, tensors, plan, on=mesh(*shape))
        for plan in ("q=S0,S1 k=S0,S1 v=S0,S1", "q=S0,R k=R,S1 v=R,S1", "q=S1,S1 k=S1,S1 v=S1,S1"):
            compare(attend(), tensors_of(**QKV), plan, on=mesh(*shape))


@case("a batch that is smaller than the mesh, or empty")
def on_small_batches():
    for batch in (0, 1):
        for plan in ("x=S0", "x=S0 residual=S0"):
            tensors = tensors_of(x=(batch, 3, 8), residual=(batch, 3, 8), weight=(8,), bias=(8,), x_bias=(8,))
            compare(norm_with_everything, tensors, plan)
        compare(attend(causal=True), tensors_of(q=(batch, 2, 3, 8), k=(batch, 2, 3, 8), v=(batch, 2, 3, 8)), "q=S0")
        compare(fastattn.feed_forward, tensors_of(x=(batch, 8), **WEIGHTS), "x=S0")


@case("no communication for what is divided already")
def without_communication():
    from torch.distributed.tensor.debug import CommDebugMode

    x, weight = distribute(torch.randn(4, 6, 8), "S1").requires_grad_(), distribute(torch.ones(8))
    heads = distribute(torch.randn(2, 4, 6, 8), "S1").requires_grad_()
    w1, w2 = distribute(torch.randn(16, 8), "S0").requires_grad_(), distribute(torch.randn(8, 16), "S1")
    whole = distribute(torch.randn(4, 6, 8)).requires_grad_()
    with CommDebugMode() as seen:
        for y in (
            fastattn.layer_norm(x, weight, residual=x),
            fastattn.attention(heads, heads, heads, causal=True),
            fastattn.feed_forward(whole, w1, None, w2, None),
        ):
            y.to_local().sum().backward()
    assert seen.get_total_counts() == 0, seen.get_comm_counts()


@case("double backward")
def twice_differentiated():
    def penalty(function, last, **tensors):
        y = F.linear(function(**tensors), last)
        first = next(iter(tensors.values()))
        (grad,) = torch.autograd.grad(y.square().mean(), first, create_graph=True)
        return grad

    for function, shapes, plans in (
        (fastattn.layer_norm, _NORM, ("x=S0", "x=S1", "x=S2")),
        (fastattn.attention, QKV, ("q=S0 k=S0 v=S0", "q=S1", "q=S2")),
        (fastattn.feed_forward, X | WEIGHTS, (COLWISE, "x=S1")),
    ):
        for plan in plans if linear_takes("S1") else plans[:1]:
            compare(lambda **t: penalty(function, **t), tensors_of(**shapes, last=(8, 8)), plan)  # noqa: B023


@case("autocast")
def under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        for function, shapes, plan in (
            (fastattn.feed_forward, X | WEIGHTS, "x=S0"),
            (fastattn.attention, QKV, "q=S1 k=S1 v=S1"),
        ):
            tensors = tensors_of(**shapes)
            places = dict(entry.split("=") for entry in plan.split())
            found = function(**{name: distribute(t, places.get(name, "R")) for name, t in tensors.items()})
            assert found.dtype == torch.bfloat16
            assert_close(found, function(**tensors), rtol=2e-2, atol=5e-2)


@case("a sum that is still to be made, and one that is not waited for")
def partial_and_asynchronous():
    from torch.distributed.tensor import DTensor

    x, weight, bias = (t.detach() for t in tensors_of(**_NORM).values())
    expected = fastattn.layer_norm(x, weight, bias)
    half = (x / 2).requires_grad_()
    partial = DTensor.from_local(half, mesh(), [placement("P")])
    found = fastattn.layer_norm(partial, distribute(weight), distribute(bias), residual=distribute(x * 0, "S1"))
    assert places_of(found) == "S1"
    assert_close(found, expected)
    found.full_tensor().square().sum().backward()
    leaf = x.clone().requires_grad_()
    fastattn.layer_norm(leaf, weight, bias).square().sum().backward()
    assert_close(half.grad, leaf.grad)
    pending = partial.redistribute(placements=[placement("S0")], async_op=True)
    assert_close(fastattn.layer_norm(pending, distribute(weight), distribute(bias)), expected)
    pending = partial.redistribute(placements=[placement("R")], async_op=True).to_local()
    assert_close(fastattn.layer_norm(pending, weight, bias), expected)


@case("rotary_embedding in place, with a module")
def rotated_in_place():
    x, rotary = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0)), nn.RotaryEmbedding(8)
    for place in ("R", "S0", "S1", "S2", "S3"):
        found = distribute(x, place)
        assert rotary(found, inplace=True) is found
        assert places_of(found) == place
        assert_close(found, rotary(x))
        for q, k in (rotary(found, distribute(x[:, :2])), rotary(distribute(x[:, :2]), found)):
            assert q.shape[0] == k.shape[0] == 2


@case("attention_decode")
def decoded():
    generator = torch.Generator().manual_seed(0)
    q, cache, new = (torch.randn(4, heads, n, 8, generator=generator) for heads, n in ((4, 1), (2, 16), (2, 1)))
    lengths = torch.tensor([3, 5, 0, 15], dtype=torch.int32)
    for place in ("R", "S0", "S1"):
        for given in (lengths, distribute(lengths)):
            k_cache, v_cache = cache.clone(), cache.clone()
            expected = fastattn.attention_decode(q, k_cache, v_cache, k=new, v=new * 2, cache_seqlens=lengths)
            k_sharded, v_sharded = (distribute(cache, place) for _ in range(2))
            found = fastattn.attention_decode(
                distribute(q, place), k_sharded, v_sharded, k=distribute(new, place), v=distribute(new * 2, place),
                cache_seqlens=given,
            )  # fmt: skip
            assert places_of(found) == places_of(k_sharded) == place
            for a, b in ((found, expected), (k_sharded, k_cache), (v_sharded, v_cache)):
                assert_close(a, b)
    pages = torch.tensor([[1], [0], [3], [2]], dtype=torch.int32)
    for indices in ({"block_table": pages}, {"cache_batch_idx": pages[:, 0].contiguous()}):
        expected = fastattn.attention_decode(q, cache, cache, cache_seqlens=lengths, **indices)
        for place, cached in (("S0", "R"), ("S1", "S1"), ("S0", "S0"), ("R", "S2")):
            caches = (distribute(cache, cached) for _ in range(2))
            found = fastattn.attention_decode(distribute(q, place), *caches, cache_seqlens=lengths, **indices)
            assert_close(found, expected)
    with raises(ValueError, "attention_decode: k_cache and v_cache are written in place: they must"):
        fastattn.attention_decode(
            distribute(q), distribute(cache, "S2"), distribute(cache, "S2"), k=distribute(new), v=distribute(new),
            cache_seqlens=lengths,
        )  # fmt: skip


def raises(kind, text):
    return pytest.raises(kind, match=re.escape(text))


@case("plain tensors beside DTensors")
def mixed():
    # large enough for our own product
    x, w1, w2 = torch.randn(512, 512), torch.randn(1024, 512), torch.randn(512, 1024)
    dtensor, target = distribute(x), torch.zeros(512, dtype=torch.int64)
    mine, torchs = "must be a DTensor, like other inputs, got a plain tensor", "got mixed torch.Tensor and DTensor"
    for kind, text, call in (
        (TypeError, f"layer_norm: weight {mine}", lambda: fastattn.layer_norm(dtensor, x[0])),
        (RuntimeError, torchs, lambda: fastattn.layer_norm(x, dtensor[0])),
        (TypeError, f"attention: k {mine}", lambda: fastattn.attention(*(t[None, None] for t in (dtensor, x, x)))),
        (RuntimeError, torchs, lambda: fastattn.attention(*(t[None, None] for t in (x, dtensor, x)))),
        (TypeError, f"feed_forward: w1 {mine}", lambda: fastattn.feed_forward(dtensor, w1, None, w2, None)),
        (RuntimeError, torchs, lambda: fastattn.feed_forward(x, distribute(w1), None, distribute(w2), None)),
        (TypeError, f"target {mine}", lambda: fastattn.linear_cross_entropy(dtensor, distribute(w1), target)),
        (RuntimeError, torchs, lambda: fastattn.linear_cross_entropy(x, distribute(w1), target)),
        (TypeError, f"dropout: residual {mine}", lambda: fastattn.dropout(dtensor, 0.5, residual=x)),
        (TypeError, f"layer_norm: weight {mine}", lambda: nn.LayerNorm(512)(dtensor)),
    ):
        with raises(kind, text):
            call()
    from torch.distributed.tensor import DeviceMesh

    if torch.distributed.get_rank() == 1:
        elsewhere = DeviceMesh("cpu", [0])
        with raises(RuntimeError, "layer_norm: this process is not part of the mesh"):
            fastattn.layer_norm(distribute(x, on=elsewhere))
    else:
        fastattn.layer_norm(distribute(x, on=DeviceMesh("cpu", [0])))
    other = distribute(x, "R", "R", on=mesh(1, 2))
    with raises(ValueError, "layer_norm: all DTensors must be on one mesh"):
        fastattn.layer_norm(dtensor, other[0])


# ---------------------------------------------------------------------------------------------------------------------
# dropout


@case("dropout draws its own mask in every part, and the same one where a part is repeated")
def dropped():
    x = torch.ones(64, 8, 64)
    torch.manual_seed(5)
    sharded = distribute(x, "S0").requires_grad_()
    y = fastattn.dropout(sharded, 0.5)
    y.sum().backward()
    assert torch.equal(whole(y), whole(sharded.grad))  # the backward draws the mask again
    first, second = (whole(y) != 0).view(2, -1)
    assert abs(first.float().mean() - 0.5) < 0.02
    assert abs((first == second).float().mean() - 0.5) < 0.02
    part = fastattn.dropout(distribute(x), 0.5).to_local()
    other = part.clone()
    torch.distributed.broadcast(other, 0)
    assert torch.equal(part, other)
    two = distribute(x, "R", "S1", on=mesh(1, 2))
    first, second = (whole(fastattn.dropout(two, 0.5)) != 0).chunk(2, 1)
    assert abs((first == second).float().mean() - 0.5) < 0.02


@case("dropout in every op: the gradient has the mask of the output")
def dropped_everywhere():
    x, ones, zeros = torch.ones(8, 16, 32), torch.ones(32), torch.zeros(8, 16, 32)
    for place in ("R", "S0", "S1"):
        # r = dropout(x) + 0 and y = r where nothing is normalised away
        sharded = distribute(x, place).requires_grad_()
        _, r = fastattn.rms_norm(
            sharded, distribute(ones), residual=distribute(zeros), dropout_p=0.5, return_residual=True
        )
        r.sum().backward()
        assert_close(sharded.grad, r)
        assert 0.4 < (whole(r) == 0).float().mean() < 0.6
    eye = torch.eye(32)
    for plan in ("x=S0", "w1=S0 w2=S1"):
        places = dict(entry.split("=") for entry in plan.split())
        x1, w1, w2 = (distribute(t, places.get(n, "R")) for n, t in (("x", x), ("w1", eye), ("w2", eye)))
        y = fastattn.feed_forward(x1.requires_grad_(), w1, None, w2, None, activation="relu", dropout_p=0.5)
        y.sum().backward()
        assert_close(x1.grad, y)  # identities around a mask
        assert 0.4 < (whole(y) == 0).float().mean() < 0.6
    q, v = torch.zeros(2, 4, 16, 16), torch.eye(16).expand(2, 4, 16, 16)
    for place in ("R", "S0", "S1", "S2"):
        v1 = distribute(v).requires_grad_()
        y = fastattn.attention(distribute(q, place), distribute(q), v1, dropout_p=0.5)
        y.sum().backward()  # dv sums the columns of the probabilities, which are y
        assert_close(v1.grad, whole(y).sum(-2, keepdim=True).mT.expand(2, 4, 16, 16))
        first, second = (whole(y)[:, :, :8] != 0, whole(y)[:, :, 8:] != 0)
        assert 0.4 < (first == second).float().mean() < 0.6


@case("need_weights after dropout")
def dropped_weights():
    layer = distribute_all(nn.MultiheadAttention(8, 2, 0.5, batch_first=True))
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    for place in taken("R", "S0", "S1"):
        found = distribute(x, place)
        out, weights = layer(found, found, found, average_attn_weights=False)
        value = F.linear(x, whole(layer.in_proj_weight)[16:], whole(layer.in_proj_bias)[16:]).unflatten(-1, (2, 4))
        heads = (whole(weights) @ value.transpose(1, 2)).transpose(1, 2).flatten(2)
        assert_close(out, F.linear(heads, whole(layer.out_proj.weight), whole(layer.out_proj.bias)))
        assert (whole(weights) == 0).any()


# ---------------------------------------------------------------------------------------------------------------------
# layers: ours in two processes, torch.nn's in one


def distribute_all(module, on=None):
    from torch.distributed.tensor import distribute_module

    return distribute_module(module, on or mesh())


def pair(name, *arguments, **options):
    """The same module of torch.nn and of ours."""
    modules = []
    for namespace in (torch.nn, nn):
        torch.manual_seed(3)
        modules.append(getattr(namespace, name)(*arguments, **options))
    return modules


def compare_modules(expected, found, inputs, place, call=None, on=None):
    """Compare outputs and all gradients. place None passes plain tensors. Returns the placements of the output."""
    inputs = [t.detach() for t in inputs]
    call = call or (lambda module, *tensors: module(*tensors))
    plain = [t.clone().requires_grad_() for t in inputs]
    given = [
        t.clone().requires_grad_() if place is None else distribute(t, *place.split(","), on=on).requires_grad_()
        for t in inputs
    ]
    results = []
    for module, tensors in ((expected, plain), (found, given)):
        module.zero_grad()
        out = call(module, *tensors)
        out = out if isinstance(out, tuple) else (out,)
        results.append(out)
        sum(whole(t).square().sum() for t in out if t is not None).backward()
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(b, a, "output")
    for a, b in zip(plain, given, strict=True):
        assert_close(b.grad, a.grad, "gradient of an input")
    same_gradients(found, expected)
    return places_of(results[1][0]) if place is not None else None


def linear_takes(place):
    """Whether torch's projections, which our layers use, accept an activation that is divided like this."""
    if place not in _linear_takes:
        x, weight = (
            distribute(torch.ones(4, 6, 8), place).requires_grad_(),
            distribute(torch.ones(8, 8)).requires_grad_(),
        )
        try:
            whole(F.linear(x, weight)).sum().backward()
            _linear_takes[place] = True
        except RuntimeError:  # before 2.13 a sequence in parts
            _linear_takes[place] = False
    return _linear_takes[place]


def taken(*places):
    return [place for place in places if linear_takes(place)]


SEQUENCES = tuple(tensors_of(a=(4, 6, 8), b=(4, 4, 8)).values())
BATCH_FIRST = {"batch_first": True}
LAYERS = {
    "LayerNorm": (("LayerNorm", 8), {}, 1, None),
    "LayerNorm of two dimensions": (("LayerNorm", (6, 8)), {}, 1, None),
    "RMSNorm": (("RMSNorm", 8), {}, 1, None),
    "MultiheadAttention": (("MultiheadAttention", 8, 2), BATCH_FIRST, 2, lambda m, x, y: m(x, y, y)),
    "MultiheadAttention without weights": (
        ("MultiheadAttention", 8, 2), BATCH_FIRST | {"add_bias_kv": True, "add_zero_attn": True}, 1,
        lambda m, x: m(x, x, x, need_weights=False),
    ),
    "TransformerEncoderLayer": (("TransformerEncoderLayer", 8, 2, 16, 0.0), BATCH_FIRST, 1, None),
    "TransformerEncoderLayer, norm first": (
        ("TransformerEncoderLayer", 8, 2, 16, 0.0, F.gelu), BATCH_FIRST | {"norm_first": True}, 1, None,
    ),
    "TransformerDecoderLayer": (("TransformerDecoderLayer", 8, 2, 16, 0.0), BATCH_FIRST, 2, None),
    "TransformerDecoderLayer, norm first": (
        ("TransformerDecoderLayer", 8, 2, 16, 0.0), BATCH_FIRST | {"norm_first": True}, 2, None,
    ),
    "Transformer": (("Transformer", 8, 2, 1, 1, 16, 0.0), {}, 2, lambda m, x, y: m(x.mT.mT, y[:, :6])),
}  # fmt: skip


def run_layer(arguments, options, count, call):
    sequences = SEQUENCES[:count]
    if arguments[0] == "Transformer":  # the sequence first
        sequences = [t.transpose(0, 1).contiguous() for t in sequences]
    places = ("R", "S0", "S1", "S2")
    for place in places if "Norm" in arguments[0] else taken(*places):
        expected, found = pair(*arguments, **options)
        compare_modules(expected, distribute_all(found), sequences, place, call)


for _name, _arguments in LAYERS.items():
    case(f"distribute_module: {_name}", *_arguments)(run_layer)


@case("distribute_module: evaluation")
def evaluated():
    for norm_first in (False, True):
        expected, found = (
            m.eval() for m in pair("TransformerEncoderLayer", 8, 2, 16, batch_first=True, norm_first=norm_first)
        )
        distribute_all(found)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                for place in taken("R", "S0", "S1"):
                    assert_close(found(distribute(SEQUENCES[0], place)), expected(SEQUENCES[0]))


@case("distribute_module: masks")
def masked():
    expected, found = pair("MultiheadAttention", 8, 2, batch_first=True)
    distribute_all(found)
    x = SEQUENCES[0].detach()
    hidden = torch.ones(6, 6, dtype=torch.bool).triu_(1)
    padding = torch.zeros(4, 6, dtype=torch.bool)
    padding[1, 4:] = True
    for attn_mask in (hidden, torch.randn(8, 6, 6, generator=torch.Generator().manual_seed(4))):
        for key_padding_mask in (None, padding, padding * -3.0):
            for prepare in (lambda mask: mask, distribute):  # plain tensors are equal in all processes
                for need_weights in (False, True):
                    masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
                    given = {name: None if mask is None else prepare(mask) for name, mask in masks.items()}
                    for place in taken("S0", "S1"):
                        y = distribute(x, place)
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore")
                            wanted = expected(x, x, x, **masks, need_weights=need_weights)
                        got = found(y, y, y, **given, need_weights=need_weights)
                        assert_close(got[0], wanted[0])
                        if need_weights:
                            assert_close(got[1], wanted[1])
    stack = distribute_all(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2))
    causal = torch.nn.Transformer.generate_square_subsequent_mask(6)
    for place in ("R", "S0"):
        x1 = distribute(x, place)
        assert_close(stack(x1, causal), stack(x1, is_causal=True))
        assert_close(stack(x1, distribute(causal)), stack(x1, is_causal=True))


def plans():
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
    )

    sequence, everywhere = placement("S1"), placement("R")
    tensor = {"linear1": ColwiseParallel(), "linear2": RowwiseParallel()}
    norms = {"norm1": SequenceParallel(), "norm2": SequenceParallel()}
    rows = {
        "linear1": ColwiseParallel(input_layouts=sequence),
        "linear2": RowwiseParallel(output_layouts=sequence, use_local_output=False),
    }
    gathered = PrepareModuleInput(
        input_layouts=(sequence,) * 3, desired_input_layouts=(everywhere,) * 3, use_local_output=False
    )
    return {
        "tensor": (tensor, None),
        "tensor, with out_proj": (tensor | {"self_attn.out_proj": RowwiseParallel(input_layouts=everywhere)}, None),
        "sequence": (norms | rows, "S1"),
        "sequence, gathered for attention": (norms | rows | {"self_attn": gathered}, "S1"),
        "norms": (norms, "S1"),
    }


def parallelize(layer, plan, on):
    from torch.distributed.tensor.parallel import parallelize_module

    layer = parallelize_module(layer, on, plan)
    if "norm1" in plan:  # activations are DTensors everywhere
        distribute_all(layer.self_attn, on)
        if "linear1" not in plan:
            distribute_all(layer.linear1, on)
            distribute_all(layer.linear2, on)
    return layer


def run_plan(name, norm_first):
    plan, place = plans()[name]
    if place == "S1" and not linear_takes(place):
        pytest.skip("torch.nn.Linear takes no sequence in parts")
    expected, found = pair("TransformerEncoderLayer", 8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
    compare_modules(expected, parallelize(found, plan, mesh()), SEQUENCES[:1], place)


for _name in ("tensor", "tensor, with out_proj", "sequence", "sequence, gathered for attention", "norms"):
    for _norm_first in (False, True):
        case(f"parallelize_module: {_name}, norm_first={_norm_first}", _name, _norm_first)(run_plan)


@case("parallelize_module: SequenceParallel takes plain tensors")
def sequence_parallel_norms():
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    for name in ("LayerNorm", "RMSNorm"):
        expected, found = (torch.nn.Sequential(module) for module in pair(name, 8))
        parallelize_module(found, mesh(), {"0": SequenceParallel()})
        x = SEQUENCES[0].detach()
        y = found(x.chunk(2, 1)[torch.distributed.get_rank()].contiguous())
        assert places_of(y) == "S1"
        assert_close(y, expected(x))
        whole(y).square().sum().backward()
        expected(x).square().sum().backward()
        same_gradients(found, expected)


def run_feed_forward(gated):
    from torch.distributed.tensor import distribute_module
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    expected = nn.FeedForward(8, 16, activation="silu", gated=gated)
    plan = {"linear1": ColwiseParallel(), "linear2": RowwiseParallel()} | ({"gate": ColwiseParallel()} if gated else {})
    compare_modules(expected, parallelize_module(copy.deepcopy(expected), mesh(), plan), SEQUENCES[:1], None)

    def divide(name, module, _):
        for label, parameter in list(module.named_parameters(recurse=False)):
            place = "S0" if name != "linear2" else "S1" if label == "weight" else "R"
            module.register_parameter(label, torch.nn.Parameter(distribute(parameter, place).detach()))

    found = distribute_module(copy.deepcopy(expected), mesh(), divide)  # without hooks, so that the fused op runs
    for place in ("R", "S0"):
        compare_modules(expected, found, SEQUENCES[:1], place)


for _gated in (False, True):
    case(f"FeedForward, gated={_gated}", _gated)(run_feed_forward)


@case("fully_shard and tensor parallelism together")
def sharded_twice():
    from torch.distributed.fsdp import fully_shard

    if not linear_takes("S1"):
        pytest.skip("torch.nn.Linear takes no sequence in parts")
    for shape in ((1, 2), (2, 1)):
        both = mesh(*shape)
        plan, _ = plans()["sequence"]
        expected, found = pair("TransformerEncoderLayer", 8, 2, 16, 0.0, batch_first=True)
        fully_shard(parallelize(found, plan, both["tp"]), mesh=both["dp"])
        compare_modules(expected, found, SEQUENCES[:1], "S1", on=both["tp"])


@case("torch.compile")
def compiled():
    for place, dropout in zip(taken("S0", "S1"), (0.0, 0.1), strict=False):
        torch.compiler.reset()
        expected, found = pair("TransformerEncoderLayer", 8, 2, 16, dropout, batch_first=True)
        distribute_all(found)
        layer = torch.compile(found, backend="aot_eager", fullgraph=True)
        if dropout:
            layer(distribute(SEQUENCES[0], place)).sum().backward()
        else:
            compare_modules(expected, found, SEQUENCES[:1], place, lambda m, x: (layer if m is found else m)(x))  # noqa: B023


@case("torch.export")
def exported():
    module = distribute_all(nn.LayerNorm(8))
    for grad in (True, False):
        with torch.set_grad_enabled(grad), raises(NotImplementedError, "torch.export does not support DTensors"):
            torch.export.export(module, (distribute(torch.randn(4, 8)),), strict=False)


# ---------------------------------------------------------------------------------------------------------------------


def _run(rank, store, results):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    failures = {}
    for name, function in CASES.items():
        torch.manual_seed(0)
        try:
            function()
        except pytest.skip.Exception as reason:
            failures[name] = f"skip: {reason}"
        except Exception:
            failures[name] = traceback.format_exc()
    with open(f"{results}.{rank}", "w", encoding="utf-8") as file:
        json.dump(failures, file)
    torch.distributed.destroy_process_group()


def main(results):
    x = torch.randn(2, 3, 4, 8)
    fastattn.layer_norm(fastattn.attention(x, x, torch.nn.Parameter(x))).sum().backward()
    assert "torch.distributed.tensor" not in sys.modules, "a plain call imports what DTensors need"

    for module in ("torch.distributed.fsdp", "torch.distributed.tensor.parallel"):
        importlib.import_module(module)  # once for both processes
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(_run, (f"{folder}/store", results), nprocs=2, start_method="fork")
