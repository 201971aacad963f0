"""What a layer keeps of its modules between two calls is never stale."""

import copy
import importlib.util
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from encoder_step import make

import fastattn
from fastattn.nn import kept, whole
from fastattn.ops._backends import why_not_available

pytestmark = [
    pytest.mark.skipif(why_not_available("native", "cpu") is not None, reason="no C++ kernels"),
    pytest.mark.skipif(importlib.util.find_spec("fastattn._C") is None, reason="fastattn._C was not built"),
]


@pytest.fixture
def reads(monkeypatch):
    """The layers that were read so far."""
    found, original = [], whole.read_tensors
    monkeypatch.setattr(whole, "read_tensors", lambda layer: found.append(layer) or original(layer))
    return found


def inputs(kind):
    return (torch.randn(2, 5, 24), torch.randn(2, 7, 24))[: 1 + (kind == "Decoder")]


@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
@pytest.mark.parametrize("train", [True, False])
def test_a_layer_is_read_once(reads, kind, train):
    layer, x = make(kind=kind).train(train), inputs(kind)
    with torch.set_grad_enabled(train):
        first = layer(*x)
        assert all(torch.equal(layer(*x), first) for _ in range(3))
    assert reads == [layer]
    layer.train(not train)
    with torch.no_grad():
        layer(*x)
    assert len(reads) == 2


class Other(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def _linear(layer, path):
    parent, _, name = path.rpartition(".")
    old = layer.get_submodule(path)
    new = torch.nn.Linear(old.in_features, old.out_features)
    setattr(layer.get_submodule(parent), name, new)


def _assign(path, value):
    def change(layer):
        parent, _, name = path.rpartition(".")
        setattr(layer.get_submodule(parent), name, value)

    return change


def _weight(change):
    def change_all(layer):
        with torch.no_grad():
            for p in layer.parameters():
                change(p)

    return change_all


def _other_data(p):
    p.data = p.data * 2


def _other_memory(p):
    p.set_(p.detach().clone() * 2)


def _wide_strides(p):
    p.data = torch.stack((p.data, p.data), -1)[..., 0] * 1.0 if p.dim() == 1 else p.data.T.contiguous().T * 2


def _scale(_, x):
    return x * 2


def _hook(layer):
    layer.linear2.register_forward_hook(lambda _, __, y: y * 2)


def _plain_attribute(layer):
    value = layer.self_attn._parameters.pop("in_proj_weight").detach()
    layer.self_attn.in_proj_weight = value * 2


def _own_dict(layer):
    layer.norm1.__dict__ = dict(layer.norm1.__dict__, eps=1.0)


def _halves_of_data(layer):
    for p in layer.parameters():
        p.data = p.data.double()


CHANGES = {
    "in place": _weight(lambda p: p.mul_(2)),
    "data": _weight(_other_data),
    "memory": _weight(_other_memory),
    "strides": _weight(_wide_strides),
    "in numpy": _weight(lambda p: p.detach().numpy().__imul__(2)),
    "linear1": lambda layer: _linear(layer, "linear1"),
    "out_proj": lambda layer: _linear(layer, "self_attn.out_proj"),
    "another parameter": lambda layer: setattr(layer.norm2, "weight", torch.nn.Parameter(torch.full((24,), 3.0))),
    "no parameter": lambda layer: setattr(layer.norm2, "bias", None),
    "in the dict": lambda layer: layer.linear1._parameters.__setitem__("bias", torch.nn.Parameter(torch.ones(40))),
    "plain attribute": _plain_attribute,
    "hook": _hook,
    "pre-hook": lambda layer: layer.linear1.register_forward_pre_hook(lambda _, x: (x[0] * 2,)),
    "forward": lambda layer: setattr(layer.dropout2, "forward", lambda x: x * 2),
    "class": lambda layer: setattr(layer.linear2, "__class__", Other),
    "block": lambda layer: setattr(layer, "_ff_block", lambda x: x * 2),
    "eps": _assign("norm1.eps", 1.0),
    "__dict__": _own_dict,
    "activation": _assign("activation", F.silu),
    "module": _assign("activation", torch.nn.SiLU()),
    "heads": _assign("self_attn.num_heads", 2),
    "layout": _assign("self_attn.batch_first", False),
    "order": lambda layer: setattr(layer, "norm_first", not layer.norm_first),
    "zero key": _assign("self_attn.add_zero_attn", True),
    "bias_k": lambda layer: [setattr(layer.self_attn, n, torch.nn.Parameter(torch.ones(1, 1, 24))) for n in _BIAS_KV],
}
_BIAS_KV = ("bias_k", "bias_v")


@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_takes_effect(change, train, kind):
    """The layer computes what a copy without cached values computes after the same change."""
    layer, x = make(kind=kind).train(train), inputs(kind)
    with torch.set_grad_enabled(train):
        before = layer(*x)
        assert kept.find_kept(layer) is not None
        CHANGES[change](layer)
        y = layer(*x)
        new = layer.__class__.__new__(layer.__class__)
        new.__dict__.update({k: v for k, v in layer.__dict__.items() if k != kept._NAME})
        assert torch.equal(y, new(*x))
        assert not torch.equal(y, before)
        assert torch.equal(layer(*x), y)


@pytest.mark.parametrize("name", ["self_attn.in_proj_weight", "linear2.bias", "norm1.weight"])
def test_a_parameter_that_stops_needing_gradients_gets_none(name):
    layer, x = make(), torch.randn(2, 5, 24)
    layer(x)
    layer.get_parameter(name).requires_grad_(False)
    layer(x).sum().backward()
    assert [n for n, p in layer.named_parameters() if p.grad is None] == [name]


def test_data_of_another_dtype_is_refused_as_in_a_new_layer():
    layer, x = make(), torch.randn(2, 5, 24)
    layer(x)
    for p in layer.parameters():
        p.data = p.data.double()
    with pytest.raises((RuntimeError, TypeError)):
        layer(x)
    assert layer(x.double()).dtype == torch.float64


def test_dropout_that_changes_is_drawn():
    layer, x = make(), torch.randn(2, 5, 24)
    first = layer(x)
    layer.dropout.p = 0.5
    assert not torch.equal(layer(x), first)
    layer.dropout.p = 0.0
    layer.self_attn.dropout = 0.5
    assert not torch.equal(layer(x), first)
    layer.self_attn.eval()
    assert torch.equal(layer(x), first)


def test_classes_and_global_hooks_are_asked_in_every_call(monkeypatch):
    layer, x, seen = make(), torch.randn(2, 5, 24), []
    layer(x)
    monkeypatch.setattr(F, "linear", lambda *args, real=F.linear: seen.append(1) or real(*args))
    layer(x)
    assert seen
    monkeypatch.undo()
    layer(x)
    monkeypatch.setattr(type(layer), "_ff_block", lambda self, x: x * 0)
    assert torch.equal(layer(x), layer.norm2(layer.norm1(x + layer._sa_block(x, None, None))))
    monkeypatch.undo()
    layer(x)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        layer(x)
    finally:
        handle.remove()
    assert layer.linear1 in seen
    monkeypatch.setattr(fastattn.nn.MultiheadAttention, "strict_torch", True)
    with pytest.raises(RuntimeError, match="attn_mask"):
        layer(x, is_causal=True)


def test_copies_keep_nothing_of_the_original():
    layer, x = make(), torch.randn(2, 5, 24)
    layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert kept.find_kept(other) is None
        assert torch.equal(other(x), layer(x))
    other = copy.copy(layer)
    other._modules = copy.deepcopy(layer._modules)
    with torch.no_grad():
        other.linear1.weight.mul_(2)
    assert not torch.equal(other(x), layer(x))
    assert kept.find_kept(other).parameters[4] is other.linear1.weight
    assert kept.find_kept(layer).parameters[4] is layer.linear1.weight
    assert list(layer.state_dict()) == [name for name, _ in layer.named_parameters()]
    replica = layer._replicate_for_data_parallel()
    replica._modules = {name: child._replicate_for_data_parallel() for name, child in layer._modules.items()}
    assert kept.find_kept(replica) is None


def test_a_file_of_a_called_layer_holds_no_class_of_ours_for_what_was_kept():
    """So torch.load(weights_only=True) reads it where it reads a layer that was never called."""
    layer, files = make(), []
    for _ in range(2):
        files.append(io.BytesIO())
        torch.save(layer, files[-1])
        layer(torch.randn(2, 5, 24))
    never, called = (set(torch.serialization.get_unsafe_globals_in_checkpoint(f)) for f in map(_rewound, files))
    assert called == never


def _rewound(file):
    file.seek(0)
    return file


def test_a_call_with_other_tensors_keeps_none_of_them():
    layer, x = make(), torch.randn(2, 5, 24)
    others = {name: p.detach() * 2 for name, p in layer.named_parameters()}
    y = torch.func.functional_call(layer, others, (x,))
    assert kept.find_kept(layer) is None
    layer(x)
    assert torch.equal(torch.func.functional_call(layer, others, (x,)), y)


def _tie(layer, share):
    if share:
        layer.norm1 = layer.norm2
    else:
        layer.norm1.weight, layer.linear2.bias = layer.norm2.weight, layer.norm2.bias


def _untie(layer, share):
    if share:
        layer.norm1 = fastattn.nn.LayerNorm(24, eps=0.5)
    else:
        layer.norm1.weight, layer.linear2.bias = (torch.nn.Parameter(torch.randn(24)) for _ in range(2))


@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("share", [True, False], ids=["module", "parameters"])
def test_what_is_shared_may_be_shared_no_longer(kind, train, share):
    layer, x = make(kind=kind).train(train), inputs(kind)
    with torch.set_grad_enabled(train):
        for change in (_tie, _untie):
            layer(*x)
            change(layer, share)
            y = layer(*x)
            assert torch.equal(layer(*x), y)
            torch.testing.assert_close(copy.deepcopy(layer)(*x), y)
            torch.testing.assert_close(_as_torch(layer)(*x), y)


def _as_torch(layer):
    layer = copy.deepcopy(layer)
    for module in layer.modules():
        if type(module).__module__.startswith("fastattn"):
            module.__class__ = getattr(torch.nn, type(module).__name__)
    return layer


class WithOwnEncoder(fastattn.nn.TransformerEncoderLayer):
    def __init__(self):
        super().__init__(24, 3, 40, 0.0, F.gelu, batch_first=True)
        self.gate = torch.nn.Linear(24, 72)
        self.multihead_attn = torch.nn.Linear(24, 24)
        self.norm3 = self.linear3 = None


class WithOwnDecoder(fastattn.nn.TransformerDecoderLayer):
    def __init__(self):
        super().__init__(24, 3, 40, 0.0, F.gelu, batch_first=True)
        self.gate = torch.nn.Linear(24, 72)
        self.linear3 = torch.nn.Tanh()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_own_children_of_a_subclass_are_not_mistaken_for_ours(kind, train):
    layer = {"Encoder": WithOwnEncoder, "Decoder": WithOwnDecoder}[kind]().train(train)
    plain, x = make(kind=kind).train(train), inputs(kind)
    plain.load_state_dict(layer.state_dict(), strict=False)
    with torch.set_grad_enabled(train):
        y = layer(*x)
        assert torch.equal(y, plain(*x))
        assert torch.equal(layer(*x), y)
        assert kept.find_kept(layer) is not None
