"""Encoder and decoder layers, their stacks and Transformer against torch.nn's: outputs and every gradient."""

import random

import pytest
import torch
import torch.nn.functional as F
from nn_oracle import compare, padding_mask, pair, score_mask, slow_path

from fastattn import nn, reference
from fastattn.ops._random import draw_rng

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched", "ignore:enable_nested_tensor is True")

E, H, FF, N, T, S = 16, 4, 24, 3, 5, 7
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "autocast": torch.float32}


def quadratic(x):
    return x * x + x


ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "F.silu": F.silu,
    "callable": quadratic,
    "nn.ReLU": torch.nn.ReLU(),
    "nn.GELU tanh": torch.nn.GELU(approximate="tanh"),
    "nn.SiLU": torch.nn.SiLU(),
    "nn.Mish": torch.nn.Mish(),
    "torch.relu": torch.relu,
}
SMOOTH = ["gelu", "F.silu", "callable"]  # no modules: in a copied decoder layer they are replaced by relu, see below
MASKS = ("tgt_mask", "memory_mask", "tgt_key_padding_mask", "memory_key_padding_mask")
ARGUMENTS = {
    "TransformerEncoderLayer": ("src", "src_mask", "src_key_padding_mask", "is_causal"),
    "TransformerEncoder": ("src", "mask", "src_key_padding_mask", "is_causal"),
    "TransformerDecoderLayer": ("tgt", "memory", *MASKS, "tgt_is_causal"),
    "TransformerDecoder": ("tgt", "memory", *MASKS, "tgt_is_causal"),
    "Transformer": ("src", "tgt", "src_mask", *MASKS[:2], "src_key_padding_mask", *MASKS[2:], "tgt_is_causal"),
}


def cases():
    draw = random.Random(1)
    for index in range(72):
        dtype = draw.choice(list(DTYPES))
        # at a kink, a rounding error in half precision changes whole gradients, in torch as well as here
        activations = ACTIVATIONS if dtype in ("fp64", "fp32") else SMOOTH
        yield {
            "index": index,
            "name": list(ARGUMENTS)[index % 5] if index % 6 else "TransformerEncoderLayer",
            "dtype": dtype,
            "batched": draw.random() < 0.8,
            "batch_first": draw.random() < 0.5,
            "norm_first": draw.random() < 0.5,
            "activation": draw.choice(list(activations)),
            "bias": draw.random() < 0.7,
            "train": draw.random() < 0.5,
            "mask": draw.choice([None, "bool", "float", "causal"]),
            "memory_mask": draw.choice([None, "bool", "float"]),
            "per_head": draw.random() < 0.3,
            "padding": draw.choice([None, "bool", "float"]),
            "hint": draw.random() < 0.5,
        }


def build(name, case, dtype):
    layer = {
        "dropout": 0.0, "activation": ACTIVATIONS[case["activation"]], "batch_first": case["batch_first"],
        "norm_first": case["norm_first"], "bias": case["bias"], "dtype": dtype,
    }  # fmt: skip
    if name == "Transformer":
        return pair(name, E, H, 1, 1, FF, seed=case["index"], **layer)
    if name.endswith("Layer"):
        return pair(name, E, H, FF, seed=case["index"], **layer)
    ours, theirs = pair(f"{name}Layer", E, H, FF, seed=case["index"], **layer)
    return getattr(nn, name)(ours, 2, nn.LayerNorm(E, dtype=dtype)), getattr(torch.nn, name)(
        theirs, 2, torch.nn.LayerNorm(E, dtype=dtype)
    )


@pytest.mark.parametrize("case", list(cases()), ids=lambda c: f"{c['index']}-{c['name']}-{c['dtype']}")
def test_matrix(case):
    name, dtype = case["name"], DTYPES[case["dtype"]]
    generator = torch.Generator().manual_seed(case["index"])
    ours, theirs = build(name, case, dtype)
    for module in (ours, theirs):
        module.train(case["train"])

    def embed(length):
        x = torch.randn(N, length, E, generator=generator).to(dtype)
        return x[0] if not case["batched"] else x if case["batch_first"] else x.transpose(0, 1).contiguous()

    lengths = {"src": S, "memory": S, "tgt": T, "mask": S}
    heads = (N * H if case["batched"] else H,) if case["per_head"] else ()
    inputs, options = {}, {}
    for argument in ARGUMENTS[name]:
        side = argument.partition("_")[0]
        length = lengths.get(side)
        if argument in ("src", "tgt", "memory"):
            inputs[argument] = embed(length)
        elif "padding" in argument:
            mask = padding_mask(generator, N, length, case["padding"], dtype)
            inputs[argument] = mask if mask is None or case["batched"] else mask[0]
        elif argument == "memory_mask":
            inputs[argument] = score_mask(generator, (*heads, T, S), case["memory_mask"], dtype)
        elif argument.endswith("mask"):
            inputs[argument] = score_mask(generator, (*heads, length, length), case["mask"], dtype)
        else:
            options[argument] = case["hint"] and case["mask"] == "causal"
    constant = [k for k in inputs if k.endswith("mask")] if case["mask"] == "causal" else []

    def call(module, **inputs):
        return module(**inputs, **options)

    compare(ours, theirs, call, inputs, case["dtype"] == "autocast", constant)


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_empty_batch(name, norm_first):
    ours, theirs = pair(name, E, H, FF, 0.0, norm_first=norm_first)
    x = [torch.randn(T, 0, E)] * (2 if "Decoder" in name else 1)
    with slow_path():
        assert ours(*x).shape == theirs(*x).shape == (T, 0, E)


def test_prelu_is_a_submodule_with_a_parameter():
    ours, theirs = pair("TransformerEncoderLayer", E, H, FF, 0.0, torch.nn.PReLU())
    assert "activation.weight" in ours.state_dict()
    compare(ours, theirs, lambda m, x: m(x), {"x": torch.randn(T, N, E)})


def test_copied_decoder_layer_forgets_an_activation_module():
    """torch's __setstate__ does this in deepcopy, so in every stack; weights trained by torch rely on it."""
    for package in (nn, torch.nn):
        layer = package.TransformerDecoderLayer(E, H, FF, activation=torch.nn.GELU())
        assert isinstance(layer.activation, torch.nn.GELU)
        assert package.TransformerDecoder(layer, 1).layers[0].activation is F.relu


def test_unknown_activation():
    for package in (nn, torch.nn):
        with pytest.raises(RuntimeError, match="activation should be relu/gelu, not tanh"):
            package.TransformerEncoderLayer(E, H, activation="tanh")


def test_transformer_errors():
    ours, theirs = pair("Transformer", E, H, 1, 1, FF)
    x = torch.randn(T, N, E)
    for module in (ours, theirs):
        with pytest.raises(RuntimeError, match="the batch number of src and tgt must be equal"):
            module(x, x[:, :1])
        with pytest.raises(RuntimeError, match="the feature number of src and tgt must be equal to d_model"):
            module(x[..., :8], x[..., :8])
    encoder, _ = pair("TransformerEncoder", ours.encoder.layers[0], 1)
    for mask in ("mask", "src_key_padding_mask"):
        with pytest.raises(AssertionError, match=f"only bool and floating types of {mask} are supported"):
            encoder(x, **{mask: torch.zeros(T, T, dtype=torch.int64)})


class TestDropout:
    """The fused layers against the reference, with the same random states drawn in the same order."""

    P = 0.3

    def attend(self, attn, x, memory):
        q, k, v = attn._project(x, memory, memory, True, True)
        out, _ = reference.attention(q, k, v, dropout_p=self.P, rng=draw_rng("cpu"))
        return F.linear(out.transpose(1, 2).flatten(2), attn.out_proj.weight, attn.out_proj.bias)

    def expected(self, layer, x, memory=None):
        def drop(x):
            return reference.dropout(x, self.P, rng=draw_rng("cpu"))

        def feed_forward(x):
            weights = (layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias)
            y = reference.feed_forward(x, *weights, activation="relu", dropout_p=self.P, rng=draw_rng("cpu"))
            return drop(y)

        blocks = [lambda x: drop(self.attend(layer.self_attn, x, x)), feed_forward]
        norms = [layer.norm1, layer.norm2]
        if memory is not None:
            blocks.insert(1, lambda x: drop(self.attend(layer.multihead_attn, x, memory)))
            norms.append(layer.norm3)
        for block, norm in zip(blocks, norms, strict=True):
            x = x + block(norm(x)) if layer.norm_first else norm(x + block(x))
        return x

    @pytest.mark.parametrize("norm_first", [False, True])
    @pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
    def test_layer(self, name, norm_first):
        layer, _ = pair(name, E, H, FF, self.P, batch_first=True, norm_first=norm_first)
        inputs = [torch.randn(N, T, E), torch.randn(N, S, E)][: 2 if "Decoder" in name else 1]
        torch.manual_seed(7)
        got = layer(*inputs)
        torch.manual_seed(7)
        torch.testing.assert_close(got, self.expected(layer, *inputs))
        got.sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())

    def test_children_are_read_at_every_call(self):
        layer = nn.TransformerEncoderLayer(E, H, FF, 0.0)
        x = torch.randn(T, N, E)
        layer.dropout1.p = layer.dropout2.p = 1.0
        torch.testing.assert_close(layer(x), layer.norm2(layer.norm1(x)))
        layer.dropout1.eval()
        layer.dropout2.eval()
        assert not torch.allclose(layer(x), layer.norm2(layer.norm1(x)))
        layer.dropout1.train()
        layer.dropout2.train()
        layer.norm1.eps = layer.norm2.eps = 1.0
        torch.testing.assert_close(layer(x), layer.norm2(layer.norm1(x)))
        layer.dropout1.p = layer.dropout2.p = 0.0
        layer.dropout.p = 1.0  # the whole hidden layer
        h = layer.norm1(x + layer.self_attn(x, x, x)[0])
        torch.testing.assert_close(layer(x), layer.norm2(h + layer.linear2.bias))

    def test_nothing_is_drawn_without_dropout(self):
        layer, x = nn.TransformerEncoderLayer(E, H, FF, 0.5), torch.randn(T, N, E)
        before = torch.get_rng_state()
        layer.eval()(x)
        assert torch.equal(before, torch.get_rng_state())
        layer.train()(x)
        assert not torch.equal(before, torch.get_rng_state())
