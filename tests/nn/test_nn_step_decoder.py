"""A decoder layer as one node in training and one call without gradients, tested like the encoder layer."""

import copy
import functools

import encoder_step
import pytest
import torch
from encoder_step import assert_close, make, step
from threads import same_bits

import fastattn
from fastattn.nn import whole
from fastattn.ops import _gemm
from fastattn.ops._backends import why_not_available

pytestmark = pytest.mark.skipif(why_not_available("native", "cpu") is not None, reason="no C++ kernels")
calls, parts = encoder_step.calls, encoder_step.parts  # fixtures
orders = pytest.mark.parametrize("norm_first", [True, False])
MASKS = ("none", "causal", "bool", "float", "padding", "both")
make = functools.partial(make, kind="Decoder")


@pytest.fixture
def inferences(monkeypatch):
    """The calls without gradients so far."""
    found, original = [], whole.encode_layer
    monkeypatch.setattr(whole, "encode_layer", lambda *args: found.append(args) or original(*args))
    return found


def masks_for(kind, batch, seqlen, keys):
    """The arguments of a layer: different masks for itself and for the memory."""
    rng = torch.Generator().manual_seed(1)

    def hidden(columns):
        mask = torch.rand(seqlen, columns, generator=rng) < 0.4
        mask[:, 0] = False
        return mask

    def padding(length):
        mask = torch.zeros(batch, length, dtype=torch.bool)
        mask[-1, length // 2 + 1 :] = True
        return mask

    return {
        "none": {},
        "causal": {"tgt_is_causal": True, "memory_is_causal": True},
        "bool": {"tgt_mask": hidden(seqlen), "memory_mask": hidden(keys)},
        "float": {
            "tgt_mask": torch.randn(seqlen, seqlen, generator=rng),
            "memory_mask": torch.randn(seqlen, keys, generator=rng),
        },
        "padding": {"tgt_key_padding_mask": padding(seqlen), "memory_key_padding_mask": padding(keys)},
        "both": {"tgt_is_causal": True, "memory_mask": hidden(keys), "memory_key_padding_mask": padding(keys)},
    }[kind]


def in_fp64(layer):
    """torch.nn's layer with the same weights, in fp64."""
    attn = layer.self_attn
    wide = torch.nn.TransformerDecoderLayer(
        attn.embed_dim, attn.num_heads, layer.linear1.out_features, 0.0, layer.activation,
        batch_first=attn.batch_first, norm_first=layer.norm_first, bias=layer.linear1.bias is not None,
        dtype=torch.float64,
    )  # fmt: skip
    wide.load_state_dict(layer.state_dict())
    return wide


def wide_masks(masks, seqlen, keys):
    """The masks as torch.nn takes them, in fp64."""
    found = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in masks.items()}
    for name, columns in (("tgt", seqlen), ("memory", keys)):
        if found.pop(f"{name}_is_causal", False):
            found[f"{name}_mask"] = torch.ones(seqlen, columns, dtype=torch.bool).triu(1)
    return found


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


CHILDREN = (
    "self_attn", "self_attn.out_proj", "multihead_attn", "multihead_attn.out_proj", "linear1", "dropout", "linear2",
    "norm1", "norm2", "norm3", "dropout1", "dropout2", "dropout3",
)  # fmt: skip


@pytest.mark.parametrize("name", CHILDREN)
def test_a_hook_or_another_class_of_any_child_takes_effect(calls, inferences, name):
    x, memory = torch.randn(1, 4, 24), torch.randn(1, 3, 24)
    for gradients in (True, False):
        for change in ("hook", "class", "forward"):
            layer, seen = make(), []
            child = layer.get_submodule(name)
            forward = type(child).forward

            def watched(self, *args, forward=forward, seen=seen, **kwargs):
                seen.append(name)
                return forward(self, *args, **kwargs)

            if change == "hook":
                child.register_forward_hook(lambda *_, seen=seen: seen.append(name))
            elif change == "class":
                child.__class__ = type("Other", (type(child),), {"forward": watched})
            else:
                child.forward = watched.__get__(child)
            with torch.set_grad_enabled(gradients):
                layer(x, memory)
            assert seen == [name], (change, gradients)
    assert not calls
    assert not inferences


def test_it_serves_only_plain_layers(calls, inferences):
    x, memory = torch.randn(1, 4, 24), torch.randn(1, 3, 24)

    def count(layer, x=x, memory=memory, context=None, **masks):
        calls.clear()
        inferences.clear()
        with context or torch.enable_grad():
            layer(x, memory, **masks)
        return len(calls), len(inferences)

    assert count(make(dropout=0.1)) == count(make(dropout=0.1).eval()) == (1, 0)
    assert count(make(dropout=0.1).eval(), context=torch.no_grad()) == (0, 1)
    assert count(make(dropout=0.1), context=torch.no_grad()) == (0, 0)
    frozen = make()
    frozen.multihead_attn.in_proj_weight.requires_grad_(False)
    assert count(frozen) == (0, 0)
    assert count(make().requires_grad_(False), x, memory.clone().requires_grad_()) == (0, 0)
    assert count(make().requires_grad_(False)) == (0, 1)
    for context in (torch.autocast("cpu", torch.float16), fastattn.use_backend("reference")):
        assert count(make(), context=context) == (0, 0)
    assert count(make(), memory_mask=torch.zeros(4, 3, requires_grad=True)) == (0, 0)
    assert count(make().double(), x.double(), memory.double()) == (0, 0)
    assert count(make(activation=torch.tanh)) == (0, 0)
    assert count(make(strict_torch=True)) == (0, 0)
    other = make()
    other.multihead_attn = fastattn.nn.MultiheadAttention(24, 2, batch_first=True)
    assert count(other) == (0, 0)
    parametrized = make()
    torch.nn.utils.parametrizations.weight_norm(parametrized.multihead_attn.out_proj)
    assert count(parametrized) == (0, 0)


@pytest.mark.parametrize("gradients", [True, False])
def test_errors_are_those_of_the_parts(parts, gradients):
    layer, x, memory = make(), torch.randn(2, 4, 24), torch.randn(2, 3, 24)
    wrong = make()
    wrong.multihead_attn.dropout = 1.5
    broken = make()
    broken.norm3.eps = None
    cases = [
        (layer, (x, memory), {"tgt_mask": torch.zeros(4, 5)}), (layer, (x, memory), {"memory_mask": torch.zeros(4, 4)}),
        (layer, (x, memory), {"memory_key_padding_mask": torch.zeros(2, 9, dtype=torch.bool)}),
        (layer, (x, memory), {"memory_mask": torch.zeros(4, 3, dtype=torch.int64)}),
        (layer, (x, memory[:1]), {}), (layer, (x, memory[..., :23]), {}), (layer, (x, memory[0]), {}),
        (layer, (x, memory.double()), {}), (wrong, (x, memory), {}), (broken, (x, memory), {}),
    ]  # fmt: skip

    def outcome(layer, inputs, masks):
        try:
            with torch.set_grad_enabled(gradients):
                return layer(*inputs, **masks).detach()
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            return type(error), str(error)

    refused = 0
    for case in cases:
        found, expected = outcome(*case), parts(lambda case=case: outcome(*case))
        assert type(found) is type(expected)
        if isinstance(found, tuple):
            assert found == expected
            refused += 1
    assert refused >= 8


WRITES = {
    "in place": lambda p, *_: p.mul_(2),
    "data": lambda p, *_: p.data.mul_(2),
    "numpy": lambda p, *_: p.detach().numpy().__imul__(2),
    "another parameter": lambda p, module, name: module._parameters.update({name: torch.nn.Parameter(p.detach() * 2)}),
}


@pytest.mark.parametrize("way", WRITES)
def test_no_weight_is_stale(inferences, way):
    layer, x, memory = make(), torch.randn(2, 6, 24), torch.randn(2, 3, 24)
    with torch.no_grad():
        before = layer(x, memory)
        for name, _ in layer.named_parameters():
            changed = copy.deepcopy(layer)
            changed(x, memory)
            path, _, last = name.rpartition(".")
            module = changed.get_submodule(path)
            WRITES[way](module._parameters[last], module, last)
            y = changed(x, memory)
            torch.testing.assert_close(y.double(), in_fp64(changed)(x.double(), memory.double()), rtol=1e-4, atol=1e-4)
            assert not torch.equal(y, before), name
    assert inferences


def test_functional_calls_and_transforms_see_their_own_tensors(parts):
    layer, x, memory = make(), torch.randn(2, 4, 24), torch.randn(2, 3, 24)
    values = {name: p.detach() * 1.5 for name, p in layer.named_parameters()}

    def loss(values):
        return torch.func.functional_call(layer, values, (x, memory)).square().sum()

    assert_close(torch.func.grad(loss)(values), parts(lambda: torch.func.grad(loss)(values)), 1e-4)


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
