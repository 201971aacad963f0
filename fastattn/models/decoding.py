"""Reads the blocks of a model as values of `Layer`, with their own weights or converted ones, for generation."""

import torch
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.encoder import TransformerEncoderLayer
from fastattn.nn.plain import dropout_p, is_plain, must_call_children
from fastattn.nn.sublayers import activation_name, are_plain
from fastattn.nn.whole import are_on_cpu, make_layer, read_plain, read_tensors
from fastattn.ops.layer import ACTIVATION_NUMBERS, convert_linear
from fastattn.reference import ACTIVATIONS

from .backbone import Head
from .block import Attention, Block
from .shape import Scores

_CHILDREN = ("linear1", "linear2"), ("dropout", "dropout1", "dropout2"), ("norm1", "norm2")
_GATED_CHILDREN = ("linear1", "linear2", "gate"), *_CHILDREN[1:]


def _why_not(block):
    """Why the children of a block must be called, or None. The block itself is not called with a cache."""
    m, attn = block._modules, block.self_attn
    linears, dropouts, norms = _CHILDREN if m.get("gate") is None else _GATED_CHILDREN
    if type(block) not in (TransformerEncoderLayer, Block) or type(attn) not in (MultiheadAttention, Attention):
        return f"it is a {type(block).__name__} with {type(attn).__name__}"
    if type(block) is Block and (block.use_torch or block.activation is not ACTIVATIONS[block.activation_name]):
        return "it computes as torch.nn does, or has an activation of its own"
    if type(block) is Block and not _is_served(block, attn):
        return "it has norms, scores or head dimensions that the op for a whole layer lacks"
    if "multihead_attn" in m:
        return "it has cross-attention"
    if not are_plain(m, linears, dropouts, norms):
        return "it has a child that is not plain, or a hook"
    if not is_plain(m["self_attn"]._modules["out_proj"], torch.nn.Linear, NonDynamicallyQuantizableLinear):
        return "its out_proj is not plain, or has a hook"
    for name in dropouts:
        if dropout_p(m[name]):
            return "it drops"
    return None


def _is_served(block, attn):
    """Whether the op for a whole layer has the norms, the scores and the activation of a Block."""
    return (
        block.norm_names == ["norm1", "norm2"] and attn.scores == Scores() and attn.sink is None
        and attn.q_norm is None and attn.num_heads * attn.head_dim == attn.embed_dim and not block.parallel
        and block.activation_name in ACTIVATION_NUMBERS
    )  # fmt: skip


def _activation(block):
    return block.activation_name if type(block) is Block else activation_name(block.activation)


def read_layer(block):
    """The block as a `Layer` with its own tensors, or None where its children must be called."""
    if _why_not(block) is not None:
        return None
    return read_plain(block, _activation(block), read_tensors(block))


def read_layers(blocks):
    """The layers of all blocks with their own tensors, or None."""
    layers = []
    for block in blocks:
        layer = read_layer(block)
        if layer is None:
            return None
        layers.append(layer)
    return layers


def convert_layer(block, weights):
    """(copy of a block with converted weights, None), or (None, why that cannot be)."""
    if (why_not := _why_not(block)) is not None:
        return None, why_not
    activation, (linears, norms) = _activation(block), read_tensors(block)
    if activation is None:
        return None, "its activation is not one of ours"
    if not are_on_cpu(linears + norms):
        return None, "a parameter is not a plain fp32 tensor on the CPU"
    converted = []
    for i in range(0, len(linears), 2):
        converted += convert_linear(linears[i], linears[i + 1], weights)
    norms = [None if t is None else t.detach().clone(memory_format=torch.contiguous_format) for t in norms]
    return make_layer(block, activation, norms, converted), None


def convert_layers(blocks, weights):
    """Copies of all blocks with converted weights, or ValueError."""
    layers = []
    for number, block in enumerate(blocks):
        layer, why_not = convert_layer(block, weights)
        if layer is None:
            raise ValueError(f"weights must be None for this model, got {weights!r}: block {number}: {why_not}")
        layers.append(layer)
    return layers


def convert_head(model, weights):
    """The output layer of a CausalLM as a `Linear` with a converted weight, or ValueError."""
    head = getattr(model, "head", None)
    if (
        type(head) is not Head
        or head.dense is not None
        or head.softcap
        or must_call_children()
        or not is_plain(head, Head)
    ):
        raise ValueError(f"weights must be None for this model, got {weights!r}: its output layer is not a plain one")
    weight = model.token_embedding.weight if head.weight is None else head.weight
    if not are_on_cpu([weight, head.bias]):
        raise ValueError(
            f"weights must be None for this model, got {weights!r}: its output layer is not fp32 on the CPU"
        )
    return convert_linear(weight, head.bias, weights)
