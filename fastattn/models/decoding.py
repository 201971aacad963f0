"""Blocks as the one call per layer takes them that generation uses, with their own weights or converted ones."""

import torch
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.encoder import TransformerEncoderLayer
from fastattn.nn.plain import dropout_p, is_plain, must_call_children
from fastattn.nn.sublayers import activation_name, are_plain
from fastattn.ops._kinds import nonplain_kind
from fastattn.ops.layer import Layer, Linear, convert_linear, present
from fastattn.reference import ACTIVATIONS

from .backbone import Head
from .block import Attention, Block


def read_layer(block, weights=None):
    """(Layer, None), or (None, why the block needs calls of its children).

    Args:
        block: of a model.
        weights: None for the block's own tensors; "bf16" or "int8" for copies of all of them, the matrices converted.
    """
    m, attn = block._modules, block.self_attn
    gate = m.get("gate")
    linears = ("linear1", "linear2") if gate is None else ("linear1", "linear2", "gate")
    if type(block) not in (TransformerEncoderLayer, Block) or type(attn) not in (MultiheadAttention, Attention):
        return None, f"it is a {type(block).__name__} with {type(attn).__name__}"
    if type(block) is Block and block.use_torch:
        return None, "it computes as torch.nn does"
    if "multihead_attn" in m:
        return None, "it has cross-attention"
    if not are_plain(m, linears, ("dropout", "dropout1", "dropout2"), ("norm1", "norm2")) or not is_plain(
        attn.out_proj, torch.nn.Linear, NonDynamicallyQuantizableLinear
    ):
        return None, "it has a child that is not plain, or a hook"
    name = block.activation_name if type(block) is Block else activation_name(block.activation)
    if name is None or (type(block) is Block and block.activation is not ACTIVATIONS[name]):
        return None, "its activation is not one of ours"
    for drop in ("dropout", "dropout1", "dropout2"):
        if dropout_p(m[drop]):
            return None, "it drops"
    norms = m["norm1"], m["norm2"]
    matrices = [(attn.in_proj_weight, attn.in_proj_bias), (attn.out_proj.weight, attn.out_proj.bias)]
    matrices += [(m[child].weight, m[child].bias) for child in linears]
    vectors = [t for norm in norms for t in (norm.weight, norm.bias)]
    tensors = [t for pair in matrices for t in pair] + vectors
    if not _is_fp32_on_cpu(*tensors):
        return None, "a parameter is not a plain fp32 tensor on the CPU"
    if weights is not None:
        matrices = tuple(convert_linear(*pair, weights) for pair in matrices)
        vectors = [None if t is None else t.detach().clone() for t in vectors]
    elif any(t is not None and not t.is_contiguous() for t in tensors):
        return None, "a parameter is not contiguous"
    else:
        matrices = tuple(Linear(weight, present(None), present(bias)) for weight, bias in matrices)
    eps = norms[0].eps, norms[1].eps
    return Layer(tuple(map(present, vectors)), matrices, attn.num_heads, block.norm_first, name, eps), None


def read_layers(blocks):
    """The layers of all blocks with their own weights, or None."""
    layers = []
    for block in blocks:
        layer, _ = read_layer(block)
        if layer is None:
            return None
        layers.append(layer)
    return layers


def convert_layers(blocks, weights):
    """The layers of all blocks with converted weights, or ValueError."""
    layers = []
    for number, block in enumerate(blocks):
        layer, why_not = read_layer(block, weights)
        if layer is None:
            raise ValueError(f"weights must be None for this model, got {weights!r}: block {number}: {why_not}")
        layers.append(layer)
    return layers


def convert_head(model, weights):
    """The output layer of a CausalLM as a `Linear` with a converted weight, or ValueError."""
    head = getattr(model, "head", None)
    if type(head) is not Head or head.dense is not None or must_call_children() or not is_plain(head, Head):
        raise ValueError(f"weights must be None for this model, got {weights!r}: its output layer is not a plain one")
    weight = model.token_embedding.weight if head.weight is None else head.weight
    if not _is_fp32_on_cpu(weight):
        raise ValueError(
            f"weights must be None for this model, got {weights!r}: its output layer is not fp32 on the CPU"
        )
    return convert_linear(weight, head.bias, weights)


def _is_fp32_on_cpu(*tensors):
    if nonplain_kind(*tensors):
        return False
    return all(t is None or (t.is_cpu and t.dtype == torch.float32) for t in tensors)
