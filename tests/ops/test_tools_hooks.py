"""PyTorch's tools that watch or patch modules from outside treat our layers like those of torch.nn."""

import contextlib
import inspect

import pytest
import torch
from tool_cases import (
    LAYERS,
    Tools,
    assert_same_outcome,
    first,
    trained,
)
from torch.autograd.graph import register_multi_grad_hook
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

import fastattn
from fastattn.ops._backends import why_not_available

pytestmark = pytest.mark.filterwarnings("ignore")  # deprecation warnings of the tools themselves

TOOLS = Tools()
tool = TOOLS.add


def without_out_proj(names):
    """torch.nn never calls out_proj, ours always does (docs/torch-nn.md)."""
    return " ".join(name for name in names if not name.endswith(("out_proj", "NonDynamicallyQuantizableLinear")))


@tool(kind=["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def hooks_on_all_modules(module, inputs, kind):
    seen = []
    for name, child in module.named_modules():
        getattr(child, f"register_{kind}")(lambda *args, name=name: seen.append(name))
    results = trained(module, inputs)
    return [without_out_proj(seen), *results]


@tool()
def hooks_for_all_modules(module, inputs):
    seen = []

    def note(module, *args):
        seen.append(type(module).__name__)

    handles = [
        module_hooks.register_module_forward_hook(note),
        module_hooks.register_module_forward_pre_hook(note),
        module_hooks.register_module_full_backward_hook(note),
    ]
    try:
        results = trained(module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [without_out_proj(seen), *results]


@contextlib.contextmanager
def replaced(owner, name, make):
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def doubled(function):
    def double(*args, **kwargs):
        out = function(*args, **kwargs)
        return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2

    return double


PATCHES = [
    "LayerNorm.forward", "RMSNorm.forward", "Dropout.forward", "GELU.forward", "MultiheadAttention.forward",
    "TransformerEncoderLayer.forward", "TransformerEncoderLayer._sa_block", "TransformerEncoderLayer._ff_block",
    "TransformerDecoderLayer.forward", "TransformerDecoderLayer._mha_block", "TransformerEncoder.forward",
    "TransformerDecoder.forward", "functional.layer_norm", "functional.rms_norm", "functional.linear",
    "functional.dropout", "functional.scaled_dot_product_attention", "functional.multi_head_attention_forward",
]  # fmt: skip


@tool(path=PATCHES)
def patch_of_torch_nn(module, inputs, path):
    owner, name = path.split(".")
    with replaced(getattr(torch.nn, owner), name, doubled):
        return trained(module, inputs)


@tool()
def patch_of_every_call(module, inputs):
    seen = []

    def noting(call):
        def noted(self, *args, **kwargs):
            seen.append(type(self).__name__)
            return call(self, *args, **kwargs)

        return noted

    with replaced(torch.nn.Module, "__call__", noting):
        results = trained(module, inputs)
    return [without_out_proj(seen), *results]


@tool()
def patch_of_the_forward_of_an_object(module, inputs):
    for child in module.modules():
        if isinstance(child, torch.nn.LayerNorm | torch.nn.Dropout):
            child.forward = doubled(child.forward)
    return trained(module, inputs)


@tool()
def gradient_hooks(module, inputs):
    counts = []
    parameters = list(module.parameters())
    register_multi_grad_hook(parameters, lambda grads: counts.append(sum(grad is not None for grad in grads)))
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: counts.append(p.grad.numel()))
    first(module(*inputs)).sum().backward()
    return [str(sorted(counts)), *(p.grad for p in parameters)]


@tool()
def function_and_dispatch_modes(module, inputs):
    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Functions(), Operators(), torch.device("cpu"):
        return trained(module, inputs)


@tool()
def module_tracker(module, inputs):
    seen = []
    with ModuleTracker() as tracker:
        for name, child in module.named_modules():
            if not name.endswith("out_proj"):
                child.register_forward_hook(lambda *args: seen.append(str(sorted(tracker.parents))))
        first(module(*inputs)).sum().backward()
    return [" ".join(seen)]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("tool", TOOLS)
def test_same_outcome(tool, name):
    assert_same_outcome(TOOLS[tool], name)


@pytest.mark.skipif(why_not_available("native", "cpu") is not None, reason="no C++ kernels")
def test_a_replaced_apply_of_autograd_functions_sees_every_node(monkeypatch):
    """As profilers replace it: a layer, self-attention and a norm are a node each."""
    x, seen, original = torch.randn(2, 5, 24), [], inspect.getattr_static(torch.autograd.Function, "apply")
    attend = fastattn.nn.MultiheadAttention(24, 3, batch_first=True)
    layers = {
        "_Step": fastattn.nn.TransformerEncoderLayer(24, 3, 40, batch_first=True),
        "_SelfAttention": lambda x: attend(x, x, x, need_weights=False)[0],
        "_PlainNorm": fastattn.nn.RMSNorm(24),
    }
    for name, layer in layers.items():
        layer(x).sum().backward()
        with monkeypatch.context() as patch:
            watched = classmethod(lambda cls, *args: seen.append(cls.__name__) or original.__get__(None, cls)(*args))
            patch.setattr(torch.autograd.Function, "apply", watched)
            layer(x).sum().backward()
        layer(x)
        assert seen == [name]
        seen.clear()
