"""An encoder or decoder layer as one call of C++, and its backward as another, if its children are plain.

Plain children have no hooks. What was read from the modules is kept for the next call only while each of them holds the
same objects (kept.py), so that a hook, a patch, another child or a changed parameter takes effect.
"""

from typing import NamedTuple

import torch

from fastattn.nn.attention import MultiheadAttention, check_dims
from fastattn.nn.kept import drop_kept, keep
from fastattn.nn.masks import attention_masks
from fastattn.nn.plain import affine, dropout_p, is_plain
from fastattn.nn.self_attention import READ, has_plain_projections
from fastattn.nn.sublayers import activation_name
from fastattn.ops import _gemm
from fastattn.ops._backends import grad_wanted
from fastattn.ops._kinds import nonplain_kind
from fastattn.ops.layer import ABSENT, ACTIVATION_NUMBERS, Layer, Memory, encode_layer, encoder_dtype, present
from fastattn.ops.layer_step import Options, train_layer

_TORCH_LAYERS = (torch.nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer)


def _crosses(layer):
    """Whether a layer attends to a memory."""
    return isinstance(layer, torch.nn.TransformerDecoderLayer)


def read_tensors(block):
    """[weight, bias, ...] of in_proj, out_proj, linear1, linear2 and gate, and the same of norm1 and norm2.

    A decoder layer has in_proj and out_proj of the attention to its memory in place of the gate, and norm3. An encoder
    layer has neither, whatever its subclass calls its own children.
    """
    m, crosses = block._modules, _crosses(block)
    attn, norms = m["self_attn"], []
    modules = [attn._modules["out_proj"], m["linear1"], m["linear2"]]
    if m.get("gate") is not None and not isinstance(block, _TORCH_LAYERS):
        modules.append(m["gate"])
    linears = [attn._parameters["in_proj_weight"], attn._parameters.get("in_proj_bias")]
    for module in modules:
        linears += affine(module)
    for name in ("norm1", "norm2"):
        norms += affine(m[name])
    if crosses:
        other = m["multihead_attn"]
        linears += [other._parameters["in_proj_weight"], other._parameters.get("in_proj_bias")]
        linears += affine(other._modules["out_proj"])
        norms += affine(m["norm3"])
    return linears, norms


def are_on_cpu(tensors, contiguous=False, dtype=torch.float32):
    """Whether all tensors that are not None are plain, on the CPU, of this dtype and, if `contiguous`, contiguous."""
    for t in tensors:  # all() on a generator takes twice as long
        if t is not None and (
            (type(t) is not torch.nn.Parameter and nonplain_kind(t))
            or t.layout is not torch.strided
            or t.dtype is not dtype
            or not t.is_cpu
            or (contiguous and not t.is_contiguous())
        ):
            return False
    return True


def make_layer(block, activation, norms, linears):
    """A block whose children are plain as a `Layer`; linears: weight, scale and bias of each linear layer."""
    m = block._modules
    eps = m["norm1"].eps, m["norm2"].eps, m["norm3"].eps if len(norms) == 6 else 0.0
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
    return is_plain(attn, MultiheadAttention) and has_plain_projections(attn)


def _masks(attn, x, keys, attn_mask, padding, is_causal, batch_first, dtype):
    """(mask, bias) as the op takes them for a query of that dtype; None if one is not a plain tensor on the CPU."""
    if attn_mask is None and padding is None:
        return None, None
    for t in (attn_mask, padding):
        if t is not None and (not t.is_cpu or nonplain_kind(t) or not (t.dtype == torch.bool or t.is_floating_point())):
            return None
    is_batched = check_dims(x, keys, keys, padding, attn_mask, attn.num_heads)
    if not is_batched:
        batch, seqlen, padding = 1, 0, None if padding is None else padding[None]
    else:
        batch, seqlen = (x.shape[0], 1) if batch_first else (x.shape[1], 0)
    mask = None if is_causal else attn_mask
    sizes = batch, attn.num_heads, x.shape[seqlen], keys.shape[seqlen]
    return attention_masks(mask, padding, *sizes, dtype)


def _fit(linears, width):
    """Whether the weights and biases of in_proj, out_proj, linear1 and linear2 have the shapes of a layer.

    In a decoder layer also those of the attention to its memory.
    """
    d_ff, attention = linears[4].shape[0], ((3 * width, width), (width, width))
    shapes = (*attention, (d_ff, width), (width, d_ff), *attention)
    for weight, bias, shape in zip(linears[::2], linears[1::2], shapes, strict=False):  # an encoder layer has four
        if weight.shape != shape or (bias is not None and bias.shape != shape[:1]):
            return False
    return True


def _dropouts(layer):
    """The dropout probabilities of a layer in the order of `Options`."""
    m = layer._modules
    own, other = m["self_attn"], m["multihead_attn"] if _crosses(layer) else None
    own_p = own.dropout if own.training else 0.0
    if other is None:
        return own_p, dropout_p(m["dropout1"]), 0.0, 0.0, dropout_p(m["dropout"]), dropout_p(m["dropout2"])
    first, second, hidden, last = (dropout_p(m[name]) for name in ("dropout1", "dropout2", "dropout", "dropout3"))
    return own_p, first, other.dropout if other.training else 0.0, second, hidden, last


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


class Reading(NamedTuple):
    """What one call needs to know of a layer whose children are plain.

    parameters: as `train_layer` takes them, of one dtype. norms, linears, options: the fields of `Layer`. dropouts: in
    the order of `Options`. width: of the tokens.
    """

    parameters: list
    norms: list
    linears: list
    options: tuple
    dropouts: tuple
    dtype: torch.dtype
    width: int


def encode(layer, x, attn_mask, padding, is_causal, reading=None):
    """An encoder layer whose feed-forward block is plain, in one call, or None where its parts must be called.

    Args:
        layer: TransformerEncoderLayer.
        x, attn_mask, padding, is_causal: as its forward takes them.
        reading: of `find_kept`, or None to read the layer.
    """
    attn = layer._modules["self_attn"]
    dtype = encoder_dtype(x)
    if dtype is None:
        return None
    read = _fitting(reading, attn, x) if reading is not None else _read(layer, attn, x)
    if read is None:
        return None
    batch_first = attn.batch_first or x.dim() == 2
    masks = _masks(attn, x, x, attn_mask, padding, is_causal, batch_first, dtype)
    if masks is None:
        return None
    return _compute(layer, x, read, reading is None, (*masks, bool(is_causal)), batch_first, dtype, None)


def decode(layer, x, memory, masks, memory_masks, reading=None):
    """A decoder layer whose feed-forward block is plain, in one call, or None where its parts must be called.

    Args:
        layer: TransformerDecoderLayer.
        x, memory: as its forward takes them.
        masks, memory_masks: (attn_mask, padding, is_causal) of self-attention and of the attention to the memory.
        reading: of `find_kept`, or None to read the layer.
    """
    m = layer._modules
    attn, other = m["self_attn"], m["multihead_attn"]
    dtype = encoder_dtype(x)
    if dtype is None or not _fits_memory(x, memory, attn.batch_first):
        return None
    if reading is not None:
        read = None if other.strict_torch else _fitting(reading, attn, x)
    else:
        alike = _is_plain_attention(other) and attn.embed_dim == other.embed_dim and attn.num_heads == other.num_heads
        read = _read(layer, attn, x) if alike and attn.batch_first == other.batch_first else None
    if read is None:
        return None
    batch_first = attn.batch_first or x.dim() == 2
    found = []
    for module, keys, (attn_mask, padding, is_causal) in ((attn, x, masks), (other, memory, memory_masks)):
        pair = _masks(module, x, keys, attn_mask, padding, is_causal, batch_first, dtype)
        if pair is None:
            return None
        found.append((*pair, bool(is_causal)))
    memory = Memory(memory if x.dim() == 3 else memory[None], *found[1])
    return _compute(layer, x, read, reading is None, found[0], batch_first, dtype, memory)


def _fits_memory(x, memory, batch_first):
    """Whether the memory is a plain tensor with tokens that fits x."""
    if type(memory) not in (torch.Tensor, torch.nn.Parameter) or not are_on_cpu([memory], dtype=x.dtype):
        return False
    if memory.dim() != x.dim() or memory.shape[-1] != x.shape[-1] or not memory.numel():
        return False
    batch = 0 if batch_first else 1
    return x.dim() == 2 or memory.shape[batch] == x.shape[batch]


def _fitting(reading, attn, x):
    """The `Reading` if it is one for x, or None."""
    fits = x.dtype is reading.dtype and x.shape[-1] == reading.width and x.dim() in (2, 3)
    return reading if fits and not attn.strict_torch else None  # strict_torch may be set on the class


def _read(layer, attn, x):
    """The `Reading` of a layer that one call may compute for x, or None."""
    if x.dim() not in (2, 3) or not _is_plain_attention(attn):
        return None
    width, n_heads = attn.embed_dim, attn.num_heads
    if x.shape[-1] != width or width > 256 * n_heads or width % n_heads:
        return None
    linears, norms = tensors = read_tensors(layer)
    found = read_plain(layer, activation_name(layer.activation), tensors, x.dtype)
    dropouts = _dropouts(layer)
    if found is None or not _fit(linears, width) or not _are_numbers((*dropouts, *found[5:])):
        return None
    return Reading(linears + norms, *found[:2], found[2:], dropouts, x.dtype, width)


_ABSENT = ("_sa_block", "_mha_block", "_ff_block")
_OF_OTHERS = {
    "dropout": ("training", "p"), "norm": ("normalized_shape", "eps"), "linear": (), "activation": ("approximate",)
}  # fmt: skip


def _keep(layer, read):
    """Keep what was read, with the names of all attributes that the checks of a layer have read."""
    watched = {layer: ("norm_first", "activation")}
    attentions = ("self_attn", "multihead_attn") if _crosses(layer) else ("self_attn",)
    for name, child in layer._modules.items():
        if name in attentions:
            watched[child] = READ
            watched[child._modules["out_proj"]] = ()
        elif child is not None and (names := _OF_OTHERS.get(name.rstrip("123"))) is not None:
            watched[child] = names
    keep(layer, read, _ABSENT, watched)


def _compute(layer, x, read, is_new, own, batch_first, dtype, memory):
    """The layer, or None where its parts must be called; own: mask, bias and is_causal of self-attention."""
    trains = torch.is_grad_enabled() and _wanted(read.parameters)
    try:
        y = (_train if trains else _infer)(x, read, own, batch_first, dtype, memory, trains)
    except RuntimeError:
        if is_new:
            raise
        drop_kept(layer)  # the insides of a tensor have changed: read all again
        return None
    if is_new and y is not None:
        _keep(layer, read)
    return y


def _train(x, read, own, batch_first, dtype, memory, _):
    mask, bias, is_causal = own
    rows = x if x.dim() == 3 else x[None]
    if not all(0 <= p <= 1 for p in read.dropouts) or grad_wanted(bias, None if memory is None else memory.bias):
        return None
    tokens = rows.shape[0] * rows.shape[1]
    products = *_gemm.most_rows(dtype, tokens), *_gemm.most_rows_of_gradients(dtype, tokens)
    causal = is_causal, memory is not None and memory.causal
    options = Options(*read.dropouts, *causal, batch_first, dtype is not x.dtype, *products, *read.options)
    y = train_layer(rows, read.parameters, mask, bias, options, memory)
    return y if x.dim() == 3 else y[0]


def _infer(x, read, own, batch_first, dtype, memory, trains):
    mask, bias, is_causal = own
    of_memory, memory_bias = (None, None) if memory is None else (memory.tokens, memory.bias)
    if (
        dtype is not x.dtype
        or any(read.dropouts)
        or trains is None
        or (torch.is_grad_enabled() and grad_wanted(x, bias, of_memory, memory_bias))
    ):
        return None
    rows = x if x.dim() == 3 else x[None]
    layer = Layer(read.norms, read.linears, *read.options)
    y = encode_layer(rows, layer, mask, bias, is_causal, batch_first, memory)
    return y if x.dim() == 3 else y[0]
