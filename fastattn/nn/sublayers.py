"""The sub-layers that the encoder layer, the decoder layer and the blocks of fastattn.models share.

A sub-layer is attention or the feed-forward block, followed by bias, dropout, residual add and norm as one op.
"""

import torch
import torch.nn.functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.norm import LayerNorm
from fastattn.nn.plain import affine, dropout_p, is_plain, must_call_children
from fastattn.ops import feed_forward, layer_norm
from fastattn.ops.linear import linear

_LINEARS, _DROPOUTS, _NORMS = (torch.nn.Linear,), (torch.nn.Dropout,), (LayerNorm, torch.nn.LayerNorm)


def add_norm(x, x_bias, residual, dropout_module, norm):
    """norm(residual + dropout(x + x_bias)) in the dtype of the sum: the end of a post-norm sub-layer."""
    if x.shape != residual.shape:  # from a user's attention
        return norm(_add(x, x_bias, residual, dropout_module))
    if x.dtype != residual.dtype:  # autocast: the op returns the dtype of x, torch the dtype of the sum
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    return layer_norm(x, *affine(norm), norm.eps, x_bias=x_bias, residual=residual, dropout_p=dropout_p(dropout_module))


def add_norm_keep_sum(x, x_bias, residual, dropout_module, norm):
    """(norm(r), r) with r = residual + dropout(x + x_bias): the step from one pre-norm sub-layer to the next."""
    if x.shape != residual.shape:
        r = _add(x, x_bias, residual, dropout_module)
        return norm(r), r
    return layer_norm(
        x, *affine(norm), norm.eps, x_bias=x_bias, residual=residual, dropout_p=dropout_p(dropout_module),
        return_residual=True,
    )  # fmt: skip


def _add(x, x_bias, residual, dropout_module):
    """residual + dropout(x + x_bias) as torch computes it, with broadcasting."""
    return residual + dropout_module(x if x_bias is None else x + x_bias)


def attend(attn, query, memory, attn_mask, key_padding_mask, is_causal):
    """(out, x_bias): attention from query to memory, and the bias of out_proj if the next norm is to add it."""
    masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask, "is_causal": is_causal}
    if is_plain(attn, MultiheadAttention):
        out_proj = attn._modules["out_proj"]
        if is_plain(out_proj, torch.nn.Linear, NonDynamicallyQuantizableLinear) and fit_fused_ops(
            attn._modules, ("out_proj",), (), query
        ):
            out, _ = attn.attend(query, memory, memory, need_weights=False, **masks)
            weight, bias = affine(out_proj)
            return (linear(out, weight), bias) if defers(bias) else (linear(out, weight, bias), None)
    return attn(query, memory, memory, need_weights=False, **masks)[0], None


def feed_forward_and_bias(x, linear1, activation, dropout_module, linear2):
    """(out, x_bias): the feed-forward block, and the bias of linear2 if the next norm is to add it."""
    _, bias = affine(linear2)
    if defers(bias):
        return feed_forward_block(x, linear1, activation, dropout_module, linear2, last_bias=False), bias
    return feed_forward_block(x, linear1, activation, dropout_module, linear2), None


def feed_forward_block(x, linear1, activation, dropout_module, linear2, last_bias=True):
    """linear2(dropout(activation(linear1(x)))) of plain children, by the fused op if it has the activation.

    Args:
        last_bias: False leaves out the bias of linear2, which the next norm adds.
    """
    name, (weight, bias) = activation_name(activation), affine(linear2)
    if not last_bias:
        bias = None
    if name is None:
        return linear(dropout_module(activation(linear1(x))), weight, bias)
    return feed_forward(x, *affine(linear1), weight, bias, activation=name, dropout_p=dropout_p(dropout_module))


def activation_name(activation):
    """The op's name for an activation, a function or a module; None if the op does not have it."""
    if isinstance(activation, torch.nn.Module):
        if is_plain(activation, torch.nn.GELU):
            return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
        if is_plain(activation, torch.nn.ReLU):
            return "relu"
        return "silu" if is_plain(activation, torch.nn.SiLU) else None
    if activation is F.relu or activation is torch.relu:
        return "relu"
    if activation is F.gelu:
        return "gelu"
    return "silu" if activation is F.silu else None


def defers(bias):
    """Whether the norm after a linear layer adds its bias: yes if the bias needs a gradient, which the norm computes.

    Never under torch.jit.trace, which records once with gradients and once without, and compares.
    """
    return bias is not None and torch.is_grad_enabled() and bias.requires_grad and not torch.jit.is_tracing()


def are_plain(modules, linears, dropouts, norms):
    """Whether the fused kernels may replace every named child."""
    if must_call_children():
        return False
    for names, classes in ((linears, _LINEARS), (dropouts, _DROPOUTS), (norms, _NORMS)):
        for name in names:  # all() on a generator takes twice as long
            if not is_plain(modules[name], *classes):
                return False
    return True


def fit_fused_ops(modules, linears, norms, x):
    """Whether plain children fit the fused ops, which add and normalise rows as wide as x; torch also broadcasts."""
    width = x.size(-1) if x.dim() else None
    for name in linears:
        weight, bias = affine(modules[name])
        if bias is not None and bias.shape != weight.shape[:1]:
            return False
    if weight.shape[0] != width:  # the last linear layer writes into the residual stream
        return False
    for name in norms:  # noqa: SIM110  all() on a generator takes twice as long
        if modules[name].normalized_shape != (width,):
            return False
    return True


def sequence_length(x, batch_first):
    """seqlen of (seqlen, d_model), (batch, seqlen, d_model) or (seqlen, batch, d_model)."""
    return x.shape[1 if x.dim() == 3 and batch_first else 0]
