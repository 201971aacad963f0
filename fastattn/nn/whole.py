"""An encoder layer as one call of C++, and its backward as another, if its children are plain and have no hooks.

Nothing is kept between two calls: each reads the modules again, so that a hook, a patch, another child or a changed
parameter takes effect.
"""

import torch
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastattn.nn.attention import MultiheadAttention, check_dims
from fastattn.nn.masks import attention_masks
from fastattn.nn.plain import affine, dropout_p, is_plain
from fastattn.nn.sublayers import activation_name
from fastattn.ops import _gemm
from fastattn.ops._backends import grad_wanted
from fastattn.ops._kinds import nonplain_kind
from fastattn.ops.layer import ABSENT, ACTIVATION_NUMBERS, Layer, encode_layer, encoder_dtype, present
from fastattn.ops.layer_step import Options, train_layer


def read_tensors(block):
    """[weight, bias, ...] of in_proj, out_proj, linear1, linear2 and gate, and the same of norm1 and norm2."""
    m = block._modules
    attn, norms = m["self_attn"], []
    modules = [attn._modules["out_proj"], m["linear1"], m["linear2"]]
    if m.get("gate") is not None:
        modules.append(m["gate"])
    linears = [attn._parameters["in_proj_weight"], attn._parameters.get("in_proj_bias")]
    for module in modules:
        linears += affine(module)
    for name in ("norm1", "norm2"):
        norms += affine(m[name])
    return linears, norms


def are_on_cpu(tensors, contiguous=False, dtype=torch.float32):
    """Whether all tensors that are not None are plain, on the CPU, of this dtype and, if `contiguous`, contiguous."""
    if nonplain_kind(*tensors):
        return False
    for t in tensors:  # all() on a generator takes twice as long
        if t is not None and (t.dtype is not dtype or not t.is_cpu or (contiguous and not t.is_contiguous())):
            return False
    return True


def make_layer(block, activation, norms, linears):
    """A block whose children are plain as a `Layer`; linears: weight, scale and bias of each linear layer."""
    m = block._modules
    eps = m["norm1"].eps, m["norm2"].eps
    n_heads = m["self_attn"].num_heads
    return Layer([present(t) for t in norms], linears, n_heads, block.norm_first, ACTIVATION_NUMBERS[activation], *eps)


def read_plain(block, activation, tensors, dtype=torch.float32):
    """A block whose children are plain as a `Layer` with its own tensors, or None.

    Args:
        activation: its name, or None.
        tensors: those of `read_tensors`.
        dtype: which they must have.
    """
    if activation is None:
        return None
    linears, norms = tensors
    if linears[0] is None or not are_on_cpu(linears, True, dtype) or not are_on_cpu(norms, True, dtype):
        return None
    unscaled = []
    for i in range(0, len(linears), 2):
        unscaled += [linears[i], ABSENT, present(linears[i + 1])]
    return make_layer(block, activation, norms, unscaled)


def _is_plain_attention(attn):
    return (
        is_plain(attn, MultiheadAttention)
        and not attn.strict_torch
        and attn.bias_k is None
        and not attn.add_zero_attn
        and attn._qkv_same_embed_dim
        and {"in_proj_weight", "in_proj_bias"} <= attn._parameters.keys()  # not plain attributes
        and is_plain(attn._modules["out_proj"], torch.nn.Linear, NonDynamicallyQuantizableLinear)
    )


def _masks(attn, x, attn_mask, padding, is_causal, batch_first, dtype):
    """(mask, bias) as the op takes them for a query of that dtype; None if one is not a plain tensor on the CPU."""
    if attn_mask is None and padding is None:
        return None, None
    for t in (attn_mask, padding):
        if t is not None and (not t.is_cpu or nonplain_kind(t)):
            return None
    is_batched = check_dims(x, x, x, padding, attn_mask, attn.num_heads)
    if not is_batched:
        batch, seqlen = 1, x.shape[0]
        padding = None if padding is None else padding[None]
    else:
        batch, seqlen = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
    mask = None if is_causal else attn_mask
    return attention_masks(mask, padding, batch, attn.num_heads, seqlen, seqlen, dtype)


def _fit(linears, width):
    """Whether the weights and biases of in_proj, out_proj, linear1 and linear2 have the shapes of a layer."""
    d_ff = linears[4].shape[0]
    shapes = (3 * width, width), (width, width), (d_ff, width), (width, d_ff)
    for weight, bias, shape in zip(linears[::2], linears[1::2], shapes, strict=True):
        if weight.shape != shape or (bias is not None and bias.shape != shape[:1]):
            return False
    return True


def _dropouts(layer):
    """The dropout probabilities of the attention weights, attention's result, the hidden layer and its result."""
    m = layer._modules
    attn = m["self_attn"]
    modules = (dropout_p(m[name]) for name in ("dropout1", "dropout", "dropout2"))
    return attn.dropout if attn.training else 0.0, *modules


def _are_numbers(values):
    """Whether all are Python numbers. Other values are left to the parts of the layer, which convert or refuse them."""
    for value in values:  # noqa: SIM110  all() on a generator takes twice as long
        if not isinstance(value, (int, float)):
            return False
    return True


def _wanted(tensors):
    """Whether the tensors that are not None need gradients: all (True), none (False), or only some (None)."""
    found = {t.requires_grad for t in tensors if t is not None}
    return None if len(found) > 1 else found.pop()


def encode(layer, x, attn_mask, padding, is_causal):
    """An encoder layer whose feed-forward block is plain, in one call, or None where its parts must be called.

    Args:
        layer: TransformerEncoderLayer.
        x, attn_mask, padding, is_causal: as its forward takes them.
    """
    m, dims = layer._modules, x.dim()
    attn = m["self_attn"]
    dtype = encoder_dtype(x)
    if dtype is None or dims not in (2, 3):
        return None
    if not _is_plain_attention(attn) or x.shape[-1] != attn.embed_dim or attn.embed_dim > 256 * attn.num_heads:
        return None
    if attn.embed_dim % attn.num_heads:
        return None
    linears, norms = tensors = read_tensors(layer)
    found = read_plain(layer, activation_name(layer.activation), tensors, x.dtype)
    if found is None or not _fit(linears, attn.embed_dim):
        return None
    batch_first = attn.batch_first or dims == 2
    masks = _masks(attn, x, attn_mask, padding, is_causal, batch_first, dtype)
    if masks is None:
        return None
    dropouts, rows = _dropouts(layer), x if dims == 3 else x[None]
    if not _are_numbers((*dropouts, m["norm1"].eps, m["norm2"].eps)):
        return None
    trains = torch.is_grad_enabled() and _wanted(linears + norms)
    if trains:
        if not all(0 <= p <= 1 for p in dropouts) or (masks[1] is not None and masks[1].requires_grad):
            return None
        tokens = rows.shape[0] * rows.shape[1]
        products = *_gemm.most_rows(dtype, tokens), *_gemm.most_rows_of_gradients(dtype, tokens)
        options = Options(*dropouts, is_causal, batch_first, dtype is not x.dtype, *products, *found[2:])
        y = train_layer(rows, linears + norms, *masks, options)
    elif (
        dtype is not x.dtype
        or any(dropouts)
        or trains is None
        or (torch.is_grad_enabled() and grad_wanted(x, masks[1]))
    ):
        return None
    else:
        y = encode_layer(rows, found, *masks, is_causal, batch_first)
    return y if dims == 3 else y[0]
