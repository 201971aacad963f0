"""A decoder layer as one node in training and one call without gradients, tested like the encoder layer."""

import functools

import decoder_step
import encoder_step
import pytest
import torch
from decoder_step import MASKS, in_fp64, make, masks_for, wide_masks
from encoder_step import assert_close, step
from threads import same_bits

from fastattn.nn import whole
from fastattn.ops import _gemm
from fastattn.ops._backends import why_not_available

pytestmark = pytest.mark.skipif(why_not_available("native", "cpu") is not None, reason="no C++ kernels")
calls, parts, inferences = encoder_step.calls, encoder_step.parts, decoder_step.inferences  # fixtures
orders = pytest.mark.parametrize("norm_first", [True, False])


def shaped(batch_first, *sizes):
    t = torch.randn(*sizes)
    return t if batch_first else t.transpose(0, 1).contiguous()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("batch_first", [True, False])
@orders
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_parts(calls, parts, norm_first, bias, batch_first, dropout):
    """Dropout draws the same masks, and the generator is left in the same state."""
    layer = make(dropout=dropout, bias=bias, batch_first=batch_first, norm_first=norm_first)
    for number, kind in enumerate(MASKS):
        x, memory = shaped(batch_first, 3, 7, 24), shaped(batch_first, 3, 11, 24)
        masks = masks_for(kind, 3, 7, 11)
        found = step(layer, x, memory, **masks)
        assert len(calls) == number + 1
        assert_close(found, parts(lambda x=x, memory=memory, masks=masks: step(layer, x, memory, **masks)))


@pytest.mark.parametrize("most", [(0, 0, 0, 0), (1000, 0, 0, 0), (0, 1000, 1000, 1000)], ids=["torch", "few", "ours"])
@orders
def test_equals_fp64(calls, inferences, monkeypatch, norm_first, most):
    """By every product, with every mask, in training and without gradients, with more and fewer keys than tokens."""
    monkeypatch.setattr(_gemm, "most_rows", lambda *_: most[:2])
    monkeypatch.setattr(_gemm, "most_rows_of_gradients", lambda *_: most[2:])
    for d_model, heads, d_ff, batch, seqlen, keys in (
        (24, 3, 40, 2, 13, 5), (33, 3, 17, 1, 1, 9), (8, 1, 3, 2, 4, 70), (24, 3, 16, 1, 66, 2)
    ):  # fmt: skip
        layer = make(d_model, heads, d_ff, norm_first=norm_first, activation="relu")
        wide = in_fp64(layer)
        # a single query that sees a single key has gradients of 0, which no relative error measures
        for kind in MASKS if seqlen > 1 else ("none", "float"):
            x, memory = torch.randn(batch, seqlen, d_model), torch.randn(batch, keys, d_model)
            masks = masks_for(kind, batch, seqlen, keys)
            found = step(layer, x, memory, **masks)
            exact = step(wide, x.double(), memory.double(), **wide_masks(masks, seqlen, keys))
            assert_close(found, exact | {"random": found["random"]}, 1e-4)
            with torch.no_grad():
                y = layer(x, memory, **masks)
            torch.testing.assert_close(y.double(), exact["y"], rtol=1e-4, atol=1e-4)
    assert len(calls) == len(inferences) == 3 * len(MASKS) + 2


@pytest.mark.parametrize("places", ["self_attn", "multihead_attn", "dropout", "dropout1", "dropout2", "dropout3"])
@orders
def test_each_dropout_alone(calls, parts, norm_first, places):
    layer, x, memory = make(norm_first=norm_first), torch.randn(2, 9, 24), torch.randn(2, 5, 24)
    child = layer.get_submodule(places)
    if places.endswith("attn"):
        child.dropout = 0.4
    else:
        child.p = 0.4
    found = step(layer, x, memory)
    assert_close(found, parts(lambda: step(layer, x, memory)))
    assert len(calls) == 1
    assert not torch.equal(found["y"], step(layer, x, memory, seed=6)["y"])
    child.eval()
    assert torch.equal(step(layer, x, memory, seed=1)["y"], step(layer, x, memory, seed=2)["y"])


@pytest.mark.skipif(not _gemm.serves_rows(2**20), reason="torch's library may add in another order")
@orders
def test_the_bits_are_those_of_the_parts(calls, parts, norm_first):
    """Except for sums that PyTorch makes in the parts, and for gradients that one kernel adds here."""
    layer = make(64, 4, 128, 0.1, norm_first=norm_first)
    x, memory = torch.randn(4, 65, 64), torch.randn(4, 70, 64)
    found, expected = step(layer, x, memory), parts(lambda: step(layer, x, memory))
    others = {"self_attn.in_proj_bias", "multihead_attn.in_proj_bias"}
    others |= {"linear2.bias", "x"} if norm_first else set()
    assert [n for n in found if n not in others and not torch.equal(found[n], expected[n])] == []
    assert len(calls) == 1


@pytest.mark.parametrize("wanted", ["both", "x", "memory", "neither"])
@orders
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_only_the_gradients_that_are_wanted(calls, parts, norm_first, wanted, dropout):
    layer = make(norm_first=norm_first, dropout=dropout)
    x, memory = torch.randn(2, 9, 24), torch.randn(2, 5, 24)

    def grads():
        torch.manual_seed(5)
        inputs = [t.clone().requires_grad_(wanted in ("both", name)) for t, name in ((x, "x"), (memory, "memory"))]
        layer.zero_grad()
        layer(*inputs).square().sum().backward()
        found = {name: t.grad for name, t in (("x", inputs[0]), ("memory", inputs[1]), *layer.named_parameters())}
        return {name: t for name, t in found.items() if t is not None}

    found = grads()
    assert_close(found, parts(grads))
    assert len(calls) == 1


def test_x_may_be_the_memory(calls, parts):
    layer, x = make(dropout=0.2), torch.randn(2, 9, 24)

    def grads():
        torch.manual_seed(5)
        leaf = x.clone().requires_grad_()
        y = layer(leaf, leaf)
        return {"y": y.detach(), "x": torch.autograd.grad(y.square().sum(), leaf)[0]}

    assert_close(grads(), parts(grads))
    assert len(calls) == 1


def test_strides_one_sequence_and_nothing_at_all(calls, inferences, parts):
    layer = make(dropout=0.2)
    pairs = [
        (torch.randn(2, 5, 48)[..., ::2], torch.randn(3, 2, 24).transpose(0, 1)),
        (torch.randn(5, 4, 24).transpose(0, 1), torch.randn(4, 6, 48)[..., ::2]),
        (torch.randn(7, 24), torch.randn(3, 24)),
        (torch.randn(2, 0, 24), torch.randn(2, 3, 24)),
    ]
    for x, memory in pairs:
        assert_close(step(layer, x, memory), parts(lambda x=x, memory=memory: step(layer, x, memory)))
    assert len(calls) == 4
    layer.eval()
    for x, memory in pairs:
        with torch.no_grad():
            y, expected = layer(x, memory), parts(lambda x=x, memory=memory: layer(x, memory))
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert len(inferences) == 4
    calls.clear()
    for x, memory in ((torch.randn(2, 3, 24), torch.randn(2, 0, 24)), (torch.randn(0, 3, 24), torch.randn(0, 2, 24))):
        assert_close(step(layer, x, memory), parts(lambda x=x, memory=memory: step(layer, x, memory)))
    assert not calls


@pytest.mark.parametrize("gradients", [True, False])
def test_reads_no_memory_around_its_operands(calls, inferences, gradients):
    layer, x, memory = make(dropout=0.3 if gradients else 0.0), torch.randn(2, 9, 24), torch.randn(2, 5, 24)

    def surrounded(t):
        around = torch.full((t.numel() + 64,), float("nan"))
        around[32:-32] = t.detach().flatten()
        return around[32:-32].view(t.shape)

    def run(x, memory):
        if gradients:
            return step(layer, x, memory)
        with torch.no_grad():
            return {"y": layer(x, memory)}

    expected = run(x, memory)
    for module in layer.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(surrounded(p))
    found = run(surrounded(x), surrounded(memory))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(calls if gradients else inferences) == 2


def test_the_bits_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(_gemm, "most_rows", lambda *_: (20, 1000))  # torch's library may add in another order
    monkeypatch.setattr(_gemm, "most_rows_of_gradients", lambda *_: (1000, 1000))
    layer = make(64, 4, 256, 0.1)
    for sizes in ((1, 16, 3), (3, 50, 70), (1, 30, 300)):
        batch, seqlen, keys = sizes
        x, memory = torch.randn(batch, seqlen, 64), torch.randn(batch, keys, 64)
        same_bits(functools.partial(step, layer, x, memory))


@orders
def test_second_derivatives_are_those_of_the_parts(calls, parts, norm_first):
    layer = make(8, 2, 12, 0.3, norm_first=norm_first, batch_first=norm_first)
    x, memory = shaped(norm_first, 3, 4, 8), shaped(norm_first, 3, 5, 8)

    def second():
        torch.manual_seed(3)
        leaves = [t.clone().requires_grad_() for t in (x, memory)]
        y = layer(*leaves, **masks_for("float", 3, 4, 5))
        firsts = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        loss = sum(t.square().sum() for t in firsts)
        grads = torch.autograd.grad(loss, (*leaves, *layer.parameters()), allow_unused=True)
        return {str(i): g for i, g in enumerate(grads) if g is not None}

    assert_close(second(), parts(second), 1e-4)
    assert len(calls) == 1


def test_several_gradients_at_once_are_those_of_the_parts(calls, parts):
    layer, x, memory = make(8, 2, 12, 0.3), torch.randn(3, 4, 8), torch.randn(3, 2, 8)

    def batched():
        torch.manual_seed(3)
        leaves = [t.clone().requires_grad_() for t in (x, memory)]
        y = layer(*leaves)
        dy = torch.stack([torch.ones_like(y), torch.linspace(-1, 1, y.numel()).view_as(y)])
        grads = torch.autograd.grad(y, (*leaves, *layer.parameters()), dy, is_grads_batched=True)
        return {str(i): g for i, g in enumerate(grads)}

    assert_close(batched(), parts(batched), 1e-4)
    assert len(calls) == 1


def test_a_graph_can_be_used_twice_and_sees_changes(calls):
    layer, x, memory = make(dropout=0.1), torch.randn(2, 5, 24), torch.randn(2, 3, 24)
    y = layer(x, memory)
    once, twice = (torch.autograd.grad(y.sum(), list(layer.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    memory.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@orders
@pytest.mark.parametrize("autocast", [False, True])
def test_the_raw_ops_check_their_operands(norm_first, autocast):
    layer, x, memory = make(dropout=0.1), torch.randn(2, 3, 24), torch.randn(2, 5, 24)
    linears, norms = whole.read_tensors(layer)
    linears = [t.detach() for t in whole.read_plain(layer, "gelu", (linears, norms)).linears]
    norms, rng = [t.detach() for t in norms], torch.zeros(6, 2, dtype=torch.int64)
    absent = torch.empty(0)
    fwd, bwd = (getattr(torch.ops.fastattn, f"layer_encode_{name}").native for name in ("fwd", "bwd"))
    rest = [*(0.1,) * 6, False, False, True, autocast, 0, 0, 0, 0, 3, norm_first, 0, 1e-5, 1e-5, 1e-5]

    def inputs(memory):
        return x, norms, linears, None, None, memory, rng, rest

    right = inputs([memory, absent, absent])
    y, *kept = fwd(*right)
    for op, args in ((fwd, right), (bwd, (y, kept, True, True, *right)), (bwd, (y, kept, False, False, *right))):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    for wrong in (
        [], [memory], [memory[0], absent, absent], [memory[:1], absent, absent], [memory[:, :0], absent, absent],
        [memory[..., :23], absent, absent], [memory, torch.ones(1, 1, 3, 4, dtype=torch.bool), absent],
        [memory, absent, torch.ones(2, 5)],
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"layer|mask|bias"):
            fwd(*inputs(wrong))
    for saved in (kept[:4], [*kept[:5], kept[5][1:]], [*kept[:4], kept[4][1:], kept[5]]):
        with pytest.raises(RuntimeError, match="layer"):
            bwd(y, saved, True, True, *right)
