"""Constructors, initialisation, state_dict, copies and pickles behave like torch.nn's."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from nn_oracle import slow_path

import fastattn
from fastattn import nn

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")

E, H, FF = 12, 3, 20
CLASSES = (
    "LayerNorm", "RMSNorm", "MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer",
    "TransformerEncoder", "TransformerDecoder", "Transformer",
)  # fmt: skip
STRICT = CLASSES[2:]

# every positional argument is passed by position in some entry
MODULES = [
    ("LayerNorm", (E, 1e-3, True, True), {}),
    ("LayerNorm", ((4, E), 1e-5, True, False), {}),
    ("LayerNorm", (E,), {"elementwise_affine": False}),
    ("RMSNorm", (E, None, True), {}),
    ("RMSNorm", ((4, E), 1e-2, False), {}),
    ("MultiheadAttention", (E, H), {}),
    ("MultiheadAttention", (E, H, 0.1, False, True, True), {}),
    ("MultiheadAttention", (E, H, 0.1, True, True, False, 8, 10, True), {}),
    ("MultiheadAttention", (E, H), {"kdim": E, "vdim": E}),
    ("MultiheadAttention", (E, H), {"bias": False, "vdim": 7}),
    ("MultiheadAttention", (E, H), {"dtype": torch.float64, "add_bias_kv": True}),
    *[
        (name, args, kwargs)
        for name in ("TransformerEncoderLayer", "TransformerDecoderLayer")
        for args, kwargs in (
            ((E, H), {}),
            ((E, H, FF, 0.3, "gelu", 1e-3, True, True, False), {}),
            ((E, H, FF), {"activation": torch.nn.PReLU()}),
            ((E, H, FF), {"dtype": torch.float64}),
        )
    ],
    ("Transformer", (E, H, 2, 1, FF), {}),
    ("Transformer", (E, H, 1, 2, FF, 0.2, F.gelu, None, None, 1e-4, True, True, False), {}),
    ("Transformer", (E, H, 1, 1, FF), {"dtype": torch.bfloat16}),
]
IDS = [f"{i}-{m[0]}" for i, m in enumerate(MODULES)]


def same_seed(name, args, kwargs):
    torch.manual_seed(4)
    ours = getattr(nn, name)(*args, **kwargs)
    ours_next = torch.rand(1)
    torch.manual_seed(4)
    theirs = getattr(torch.nn, name)(*args, **kwargs)
    assert torch.equal(ours_next, torch.rand(1)), "another number of random draws"
    return ours, theirs


def assert_same_state(ours, theirs):
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype
        assert torch.equal(ours[key], value), key


@pytest.mark.parametrize("name", CLASSES)
def test_class(name):
    ours, theirs = getattr(nn, name), getattr(torch.nn, name)
    assert issubclass(ours, theirs)
    assert ours.__constants__ == theirs.__constants__ if hasattr(theirs, "__constants__") else True
    signatures = [list(inspect.signature(c.__init__).parameters.values()) for c in (ours, theirs)]
    added = [p for p in signatures[0] if p.kind is p.KEYWORD_ONLY]
    ours_alone = ["strict_torch"] if name in STRICT else []
    assert [p.name for p in added] == ours_alone + ["padding_free"] * (name == "TransformerEncoder")
    described = [[(p.name, p.default) for p in s if p not in added] for s in signatures]
    assert described[0] == described[1]
    forwards = [[(p.name, p.default) for p in inspect.signature(c.forward).parameters.values()] for c in (ours, theirs)]
    assert forwards[0] == forwards[1]


@pytest.mark.parametrize(("name", "args", "kwargs"), MODULES, ids=IDS)
class TestModule:
    def test_same_seed_same_weights(self, name, args, kwargs):
        ours, theirs = same_seed(name, args, kwargs)
        assert_same_state(ours.state_dict(), theirs.state_dict())

    def test_children_and_attributes(self, name, args, kwargs):
        ours, theirs = same_seed(name, args, kwargs)
        assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
        for (path, mine), module in zip(ours.named_modules(), theirs.modules(), strict=True):
            kind = type(module).__name__
            assert type(mine) is (getattr(nn, kind) if kind in CLASSES else type(module)), path
            public = {k: v for k, v in module.__dict__.items() if isinstance(v, (int, float, str, tuple, bool))}
            public.pop("use_nested_tensor", None)  # ours never converts
            assert {k: mine.__dict__.get(k) for k in public} == public, path
        assert repr(ours) == repr(theirs)

    def test_strict_loading_both_ways(self, name, args, kwargs):
        ours, theirs = same_seed(name, args, kwargs)
        other = getattr(nn, name)(*args, **kwargs)
        other.load_state_dict(theirs.state_dict(), strict=True)
        assert_same_state(other.state_dict(), theirs.state_dict())
        other = getattr(torch.nn, name)(*args, **kwargs)
        other.load_state_dict(ours.state_dict(), strict=True)
        assert_same_state(other.state_dict(), ours.state_dict())

    def test_deepcopy_and_pickle(self, name, args, kwargs):
        ours = getattr(nn, name)(*args, **kwargs).eval()
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        copies = copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)
        for twin in copies:
            assert_same_state(twin.state_dict(), ours.state_dict())
            assert [type(m) for m in twin.modules()] == [type(m) for m in ours.modules()]
            assert not twin.training
            pointers = {p.data_ptr() for p in ours.parameters()}
            assert not any(p.data_ptr() in pointers for p in twin.parameters())


def test_activation_attributes():
    flags = [("relu", 1), (F.relu, 1), (torch.nn.ReLU(), 1), ("gelu", 2), (F.gelu, 2), (F.silu, 0)]
    for activation, expected in [*flags, (torch.nn.GELU(approximate="tanh"), 2), (torch.relu, 0)]:
        assert nn.TransformerEncoderLayer(E, H, activation=activation).activation_relu_or_gelu == expected


def test_stacks_copy_without_drawing():
    layer = nn.TransformerEncoderLayer(E, H, FF)
    before = torch.get_rng_state()
    stack = nn.TransformerEncoder(layer, 3, nn.LayerNorm(E))
    assert torch.equal(before, torch.get_rng_state())
    for copied in stack.layers:
        assert copied is not layer
        assert_same_state(copied.state_dict(), layer.state_dict())
    assert (stack.num_layers, stack.enable_nested_tensor, stack.mask_check) == (3, True, True)


def test_custom_stacks_are_kept_and_initialised_again():
    def build(package):
        torch.manual_seed(0)
        encoder = torch.nn.Sequential(torch.nn.Linear(E, E))
        return package.Transformer(E, H, 1, 1, FF, custom_encoder=encoder)

    ours, theirs = build(nn), build(torch.nn)
    assert type(ours.encoder) is torch.nn.Sequential
    assert_same_state(ours.state_dict(), theirs.state_dict())


def test_square_subsequent_mask():
    for arguments in ((4,), (3, torch.device("cpu"), torch.float64), (0,)):
        ours = nn.Transformer.generate_square_subsequent_mask(*arguments)
        theirs = torch.nn.Transformer.generate_square_subsequent_mask(*arguments)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_reset_parameters_is_an_override_point():
    class Zeros(nn.MultiheadAttention):
        def _reset_parameters(self):
            torch.nn.init.zeros_(self.in_proj_weight)

    class Ones(nn.Transformer):
        def _reset_parameters(self):
            for parameter in self.parameters():
                torch.nn.init.ones_(parameter)

    assert not Zeros(E, H).in_proj_weight.any()
    assert all((p == 1).all() for p in Ones(E, H, 1, 1, FF).parameters())


def test_old_pickles():
    """Objects saved before an attribute existed get the attribute when they are loaded."""
    attention = nn.MultiheadAttention(E, H)
    state = attention.__dict__.copy()
    del state["_qkv_same_embed_dim"]
    old = nn.MultiheadAttention.__new__(nn.MultiheadAttention)
    old.__setstate__(state)
    x = torch.randn(4, 2, E)
    torch.testing.assert_close(old(x, x, x), attention(x, x, x))
    for kind, inputs in ((nn.TransformerEncoderLayer, (x,)), (nn.TransformerDecoderLayer, (x, x))):
        layer = kind(E, H, FF, 0.0)
        state = layer.__dict__.copy()
        del state["activation"]
        old = kind.__new__(kind)
        old.__setstate__(state)
        torch.testing.assert_close(old(*inputs), layer(*inputs))


def test_stack_attributes_that_older_objects_lack():
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, FF, 0.0), 1)
    x = torch.randn(4, 2, E)
    expected = stack(x)
    for attribute in ("mask_check", "use_nested_tensor", "enable_nested_tensor"):
        delattr(stack, attribute)
    torch.testing.assert_close(stack(x), expected)


class TestMixedWithTorch:
    """Our layers in torch's containers, and torch's layers in ours."""

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("batch_first", [False, True])
    def test_encoder(self, batch_first, masked, padded):
        ours = nn.TransformerEncoderLayer(E, H, FF, 0.0, batch_first=batch_first).eval()
        theirs = torch.nn.TransformerEncoderLayer(E, H, FF, 0.0, batch_first=batch_first).eval()
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(3, 5, E) if batch_first else torch.randn(5, 3, E)
        masks = {
            "mask": torch.ones(5, 5).triu(1).bool() if masked else None,
            "src_key_padding_mask": torch.arange(5) >= torch.tensor([5, 2, 3])[:, None] if padded else None,
        }
        stacks = [
            container(layer, 2, torch.nn.LayerNorm(E))
            for container in (torch.nn.TransformerEncoder, nn.TransformerEncoder)
            for layer in (theirs, ours)
        ]
        with slow_path():
            outputs = [stack(x, **masks) for stack in stacks]
        for output in outputs[1:]:
            torch.testing.assert_close(output, outputs[0])

    @pytest.mark.parametrize("masked", [False, True])
    def test_decoder(self, masked):
        ours = nn.TransformerDecoderLayer(E, H, FF, 0.0, norm_first=True)
        theirs = torch.nn.TransformerDecoderLayer(E, H, FF, 0.0, norm_first=True)
        theirs.load_state_dict(ours.state_dict())
        x, memory = torch.randn(5, 3, E), torch.randn(4, 3, E)
        mask = torch.ones(5, 5).triu(1).bool() if masked else None
        outputs = [
            container(layer, 2)(x, memory, mask)
            for container in (torch.nn.TransformerDecoder, nn.TransformerDecoder)
            for layer in (theirs, ours)
        ]
        for output in outputs[1:]:
            torch.testing.assert_close(output, outputs[0])

    def test_transformer_with_custom_stacks_of_torch(self):
        encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(E, H, FF, 0.0), 1)
        model = nn.Transformer(E, H, 1, 1, FF, 0.0, custom_encoder=encoder)
        src, tgt = torch.randn(6, 2, E), torch.randn(4, 2, E)
        torch.testing.assert_close(model(src, tgt), model.decoder(tgt, encoder(src)))

    def test_to_another_dtype_and_device(self):
        layer = nn.TransformerEncoderLayer(E, H, FF, device="meta")
        assert layer(torch.empty(3, 2, E, device="meta")).device.type == "meta"
        layer = nn.TransformerEncoderLayer(E, H, FF).double()
        assert layer(torch.randn(3, 2, E, dtype=torch.float64)).dtype == torch.float64


def test_names_are_exported():
    for name in (*CLASSES, "FeedForward"):
        assert name in nn.__all__
    assert nn.replace is fastattn.replace
    assert fastattn.nn is nn
