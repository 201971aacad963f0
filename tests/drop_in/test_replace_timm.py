"""`replace` on models of timm with random weights: logits, gradients, and the old bits after `undo`.

timm imports torchvision for its data sets. Where that does not fit the installed PyTorch, empty classes stand for it.
"""

import collections
import copy
import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch
from oracle import BACKWARD, assert_accurate

import fastattn


class _Kind(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _StandIn(types.ModuleType):
    """A module of torchvision. Each of its names is an empty class, whose attributes are their own names."""

    __path__: tuple = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Kind(name, (), {})


class _Finder:
    """Imports stand-ins for torchvision and its parts."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        pass


@pytest.fixture(scope="module")
def timm():
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        finder = _Finder()
        sys.meta_path.insert(0, finder)
        try:
            return importlib.import_module("timm")
        finally:
            sys.meta_path.remove(finder)
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
    return importlib.import_module("timm")


VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
OF_VIT = {"LayerNorm": 5, "attention": 2, "feed-forward,": 2, "Linear": 9}
# name in timm: (changes of the model, what is replaced)
MODELS = {
    "vit_tiny_patch16_224": (VIT, OF_VIT),
    "deit_tiny_patch16_224": (VIT, OF_VIT),
    "swin_tiny_patch4_window7_224": (
        {
            "img_size": 32,
            "window_size": 4,
            "embed_dim": 16,
            "depths": (2, 2),
            "num_heads": (2, 4),
            "drop_path_rate": 0.0,
        },
        {"LayerNorm": 11, "attention": 4, "feed-forward,": 4, "Linear": 18},
    ),
    "convnext_atto": ({"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 16)}, {"LayerNorm": 9, "Linear": 1}),
}


def step(model, images):
    model.zero_grad()
    logits = model(images)
    (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape).to(logits.dtype)).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name, dtype, timm):
    changes, expected = MODELS[name]
    model = timm.create_model(name, pretrained=False, num_classes=6, **changes)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    images = torch.randn(2, 3, changes.get("img_size", 32), changes.get("img_size", 32))
    exact, exact_grads = step(copy.deepcopy(model).double(), images.double())
    model, images = model.to(dtype), images.to(dtype)
    logits, grads = step(model, images)
    report = fastattn.replace(model)
    assert report.left == {}
    assert collections.Counter(what.partition(" ")[0] for what in report.replaced.values()) == expected
    ours, our_grads = step(model, images)
    assert_accurate(ours, exact, logits, what="logits")
    largest = max(grad.abs().max().item() for grad in exact_grads.values())
    for key, grad in our_grads.items():
        slack = torch.finfo(torch.float32).eps * largest
        assert_accurate(grad, exact_grads[key], grads[key], BACKWARD, f"gradient of {key}", slack)
    report.undo()
    again, again_grads = step(model, images)
    assert torch.equal(again, logits)
    assert all(torch.equal(again_grads[key], grad) for key, grad in grads.items())
