"""MultiheadAttention of a sequence to itself in a training step, as one node of autograd, if its children are plain."""

from typing import NamedTuple

import torch
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastattn.nn.kept import find_kept, keep
from fastattn.nn.masks import attention_masks, check_mask_dtype
from fastattn.nn.plain import affine, is_plain, must_call_children
from fastattn.ops._backends import grad_wanted
from fastattn.ops._kinds import nonplain_kind
from fastattn.ops.layer import encoder_dtype
from fastattn.ops.self_attention import train_attention

READ = (
    "training", "dropout", "num_heads", "embed_dim", "batch_first", "bias_k", "bias_v", "add_zero_attn", "strict_torch",
    "_qkv_same_embed_dim",
)  # fmt: skip
"""The attributes of a MultiheadAttention that one call depends on."""
_METHODS = ("attend", "_project_out", "_project", "_visibility")


class _Reading(NamedTuple):
    """parameters: weight and bias of in_proj and out_proj, of one dtype."""

    parameters: list
    dtype: torch.dtype
    dropout: float


def has_plain_projections(attn):
    """Whether a MultiheadAttention has one weight for q, k and v, a plain out_proj, and no keys of its own."""
    return (
        not attn.strict_torch
        and attn.bias_k is attn.bias_v is None
        and not attn.add_zero_attn
        and attn._qkv_same_embed_dim
        and {"in_proj_weight", "in_proj_bias"} <= attn._parameters.keys()  # not plain attributes
        and is_plain(attn._modules["out_proj"], torch.nn.Linear, NonDynamicallyQuantizableLinear)
    )


def train_itself(attn, x, padding, attn_mask, is_causal):
    """Self-attention of x by an unchanged MultiheadAttention that needs gradients, or None where its parts must run.

    Args:
        attn: MultiheadAttention, of this class and no other.
        x, padding, attn_mask, is_causal: as its forward takes them; no weights are wanted.
    """
    if not torch.is_grad_enabled() or encoder_dtype(x) is not x.dtype or x.dim() != 3 or not x.numel():
        return None
    reading = find_kept(attn)
    is_new = reading is None
    if is_new:
        reading = None if must_call_children() else _read(attn)
    if reading is None or x.dtype is not reading.dtype or x.shape[-1] != attn.embed_dim or attn.strict_torch:
        return None
    for t in reading.parameters:
        if t is not None and not t.requires_grad:
            return None
    masks = _masks(attn, x, padding, None if is_causal else attn_mask)
    if masks is None or grad_wanted(masks[1]):
        return None
    if not _fit(reading.parameters, x):
        return None
    if is_new:
        keep(attn, reading, _METHODS, {attn: READ, attn._modules["out_proj"]: ()})
    dropout_p = reading.dropout if attn.training else 0.0
    return train_attention(
        x, reading.parameters, *masks, attn.num_heads, bool(is_causal), dropout_p, attn.batch_first
    )  # fmt: skip


def _read(attn):
    """The `_Reading` of a module, or None if one call may not compute it."""
    if not has_plain_projections(attn) or any(name in attn.__dict__ for name in _METHODS):
        return None
    width, p = attn.embed_dim, attn.dropout
    parameters = [attn._parameters["in_proj_weight"], attn._parameters["in_proj_bias"]]
    parameters += affine(attn._modules["out_proj"])
    if parameters[0] is None or width % attn.num_heads or width > 256 * attn.num_heads:
        return None
    if nonplain_kind(*parameters) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
        return None
    return _Reading(parameters, parameters[0].dtype, p)


def _fit(parameters, x):
    """Whether the parameters have the dtype and device of x, and the shapes of self-attention."""
    width = x.shape[-1]
    for t, shape in zip(parameters, ((3 * width, width), (3 * width,), (width, width), (width,)), strict=True):
        if t is not None and (t.shape != shape or t.dtype is not x.dtype or not t.is_cpu or not t.is_contiguous()):
            return False
    return True


def _masks(attn, x, padding, attn_mask):
    """(mask, bias) as the op takes them; None if one is no plain tensor on the CPU of the usual dimensions."""
    if padding is None and attn_mask is None:
        return None, None
    batch, seqlen = x.shape[:2] if attn.batch_first else x.shape[1::-1]
    for t, name, dims in ((padding, "key_padding_mask", (2,)), (attn_mask, "attn_mask", (2, 3))):
        check_mask_dtype(t, name)
        if t is not None and (not t.is_cpu or nonplain_kind(t) or t.dim() not in dims):
            return None
    return attention_masks(attn_mask, padding, batch, attn.num_heads, seqlen, seqlen, x.dtype)
