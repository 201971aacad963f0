"""What a layer keeps of its modules between two calls owns nothing."""

import gc
import importlib.util
import weakref

import pytest
import torch
from encoder_step import make

import fastattn
from fastattn.nn import kept
from fastattn.ops._backends import why_not_available
from fastattn.ops._libraries import introspection

pytestmark = [
    pytest.mark.skipif(why_not_available("native", "cpu") is not None, reason="no C++ kernels"),
    pytest.mark.skipif(importlib.util.find_spec("fastattn._C") is None, reason="fastattn._C was not built"),
]


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


LAYERS = {
    "Encoder": lambda x: (make(kind="Encoder"), [x], {}),
    "Decoder": lambda x: (make(kind="Decoder"), [x, x], {}),
    "attention": lambda x: (fastattn.nn.MultiheadAttention(24, 3, batch_first=True), [x] * 3, {"need_weights": False}),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_what_a_layer_drops_is_freed_at_once(kind, no_collector):
    """A replaced parameter, a replaced child and the layer itself, without the garbage collector."""
    layer, x, options = LAYERS[kind](torch.randn(2, 5, 24))
    for trains in (True, False):
        with torch.set_grad_enabled(trains):
            layer(*x, **options)
    attn = layer if kind == "attention" else layer.self_attn
    gone = [weakref.ref(t) for t in (attn.in_proj_weight, attn.out_proj.bias, attn.out_proj)]
    attn.in_proj_weight = torch.nn.Parameter(attn.in_proj_weight.detach().clone())
    attn.out_proj = torch.nn.Linear(24, 24)
    assert [t() for t in gone] == [None] * 3
    layer(*x, **options)
    gone = [weakref.ref(t) for t in (layer, *layer.modules(), *layer.parameters())]
    del layer, attn
    assert all(t() is None for t in gone)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ["in_proj_weight", "out_proj.bias"])
def test_a_parameter_on_meta_is_noticed(kind, train, name):
    """As torch does: an error or a result on meta, no numbers."""
    layer, x, options = LAYERS[kind](torch.randn(2, 5, 24))
    with torch.set_grad_enabled(train):
        layer(*x, **options)
        attn = layer if kind == "attention" else layer.self_attn
        p = attn.get_parameter(name)
        torch.utils.swap_tensors(p, torch.nn.Parameter(torch.empty_like(p, device="meta")))
        del p
        try:
            y = layer(*x, **options)
        except (RuntimeError, NotImplementedError):
            return
        assert (y[0] if isinstance(y, tuple) else y).is_meta


PART = (0, "", type(make()), ("training", True), (), (), ())


def test_unchanged_finds_the_parameters():
    unchanged, layer = introspection().unchanged, make()
    own, kind = layer.__dict__["_parameters"], torch.nn.Parameter
    children = kept._present(layer._modules)
    parts = ((*PART[:5], children, ()), (0, "norm1", type(layer.norm1), (), ("weight", True, "bias", True), (), ()))
    wanted = (1, "bias", 1, "weight"), (-1, own), ()
    assert not own
    bias, weight = layer.norm1.bias, layer.norm1.weight
    assert [[id(p) for p in found] for found in unchanged(layer, (kind, parts, wanted))] == [
        [id(bias), id(weight)], [id(own)], [],
    ]  # fmt: skip
    assert unchanged(layer, (torch.Tensor, parts, wanted)) is None
    assert unchanged(layer, (kind, (PART,), ())) is None  # it has children
    assert unchanged(layer, (kind, parts, ((2, "bias"),))) is None
    assert unchanged(layer, (kind, parts, ((-2, "bias"),))) is None
    assert unchanged(layer, (kind, parts, ((1, "bas"),))) is None


def test_unchanged_checks_its_arguments():
    unchanged, layer, kind = introspection().unchanged, make(), torch.nn.Parameter
    many, short, lists = (PART,) * 33, (PART[:6],), ((*PART[:6], []),)
    for parts in (None, [], many, short, lists, (None,)):
        with pytest.raises(TypeError):
            unchanged(layer, (kind, parts, ()))
    plans = None, (), (kind, (), []), (kind, ()), (kind, (), ([],))
    for arguments in ((), (layer,), *((layer, plan) for plan in plans)):
        with pytest.raises(TypeError):
            unchanged(*arguments)
    own, children = (*PART[:5], kept._present(layer._modules), ()), PART[1:]
    for parent in (None, "0", 2**70):
        with pytest.raises((TypeError, OverflowError)):
            unchanged(layer, (kind, (own, (parent, *children)), ()))
    for parent in (-1, 1, 5):
        assert unchanged(layer, (kind, (own, (parent, *children)), ())) is None
    assert unchanged(None, (kind, (PART,), ())) is None
    with pytest.raises(TypeError):
        unchanged(layer, (kind, ((*PART[:3], ([], 1), (), (), ()),), ()))  # no key of a dict
    slots = type("Slots", (), {"__slots__": ()})()
    with pytest.raises(AttributeError):
        unchanged(slots, (kind, ((0, "", type(slots), (), (), (), ()),), ()))
