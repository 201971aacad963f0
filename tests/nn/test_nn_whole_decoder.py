"""Which decoder layers are one node or call: children with additions, errors, changed weights."""

import copy

import decoder_step
import encoder_step
import pytest
import torch
from decoder_step import in_fp64, make
from encoder_step import assert_close

import fastattn
from fastattn.ops._backends import why_not_available

pytestmark = pytest.mark.skipif(why_not_available("native", "cpu") is not None, reason="no C++ kernels")
calls, parts, inferences = encoder_step.calls, encoder_step.parts, decoder_step.inferences  # fixtures

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
