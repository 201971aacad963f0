"""Decoder layers in a training step and without gradients, for the tests of the layer as one node or call."""

import functools

import encoder_step
import pytest
import torch

from fastattn.nn import whole

MASKS = ("none", "causal", "bool", "float", "padding", "both")
make = functools.partial(encoder_step.make, kind="Decoder")


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
