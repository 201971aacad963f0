"""Ops on DTensors: outputs, gradients, placements of the outputs, dropout, communication and refused calls."""

import torch
import torch.nn.functional as F
from dtensor_cases import (
    assert_close,
    case,
    compare,
    distribute,
    linear_takes,
    mesh,
    placement,
    places_of,
    raises,
    tensors_of,
    whole,
)

import fastattn
from fastattn import nn

# (function, shapes of its float tensors, {plan: placements of the first output})
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
