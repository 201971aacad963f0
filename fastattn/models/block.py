"""The residual blocks of all models: the layers of torch.nn or fastattn.nn, or `Block` for features that they lack.

    post-norm: x = norm1(x + dropout1(SA(x)));  [x = norm2(x + dropout2(CA(x, memory)));]  x = norm(x + dropout(FF(x)))
    pre-norm:  the norms come before SA, CA and FF instead
    parallel:  x = x + dropout1(SA(norm1(x))) + dropout2(FF(norm1(x)))
    outputs of SA, CA and FF may have a norm of their own, before dropout

The functions here take any of these, since the children have the same names.
"""

import torch
from torch import nn

from fastattn import reference
from fastattn.nn.decoder import TransformerDecoderLayer
from fastattn.nn.encoder import TransformerEncoderLayer
from fastattn.nn.norm import LayerNorm, RMSNorm
from fastattn.nn.plain import affine, dropout_p, is_plain
from fastattn.nn.sublayers import are_plain
from fastattn.ops import dropout, feed_forward, layer_norm, rms_norm
from fastattn.ops.linear import linear

from .sequences import attention_weights
from .shape import FEED_FORWARDS

_NORMS = {"layer": (nn.LayerNorm, LayerNorm), "rms": (nn.RMSNorm, RMSNorm)}
_ALL_NORMS = (*_NORMS["layer"], *_NORMS["rms"])


def make_norm(shape, width):
    """A norm of the kind, weights and library that a Shape names."""
    norm = _NORMS[shape.norm][shape.layers == "fastattn"]
    bias = {"bias": shape.bias} if shape.norm == "layer" else {}
    return norm(width, shape.norm_eps, elementwise_affine=shape.norm_weight, **bias)


def make_block(shape, layer, cross):
    """The block of a layer, with cross-attention if `cross`: from torch.nn or fastattn.nn, or a `Block`."""
    if not shape.is_classic:
        return Block(shape, layer, cross)
    if shape.layers == "torch":
        kind = nn.TransformerDecoderLayer if cross else nn.TransformerEncoderLayer
    else:
        kind = TransformerDecoderLayer if cross else TransformerEncoderLayer
    return kind(
        shape.d_model, shape.n_head, shape.hidden, shape.dropout, FEED_FORWARDS[shape.feed_forward][0], shape.norm_eps,
        batch_first=True, norm_first=shape.norm_first, bias=shape.bias,
    )  # fmt: skip


def run_block(block, x, sequences, memory=None, memory_sequences=None):
    """Run a block on x, (batch, seqlen, d_model) or flat (tokens, d_model), the tokens of `sequences`."""
    if isinstance(block, Block):
        return block(x, sequences, memory, memory_sequences)
    if sequences.flat:
        return block.forward_packed(x, sequences.cu_seqlens, sequences.seqlen, is_causal=sequences.causal)
    mask, padding, is_causal = sequences.layer_masks(block.self_attn.num_heads)
    if memory is None:
        return block(x, src_mask=mask, src_key_padding_mask=padding, is_causal=is_causal)
    return block(
        x, memory, tgt_mask=mask, memory_key_padding_mask=memory_sequences.padding, tgt_is_causal=is_causal
    )  # fmt: skip


def project(attn, x, parts="qkv"):
    """Project x to heads in one product: q, k and v, or only "q" or "kv".

    Returns: tuple of views (batch, heads, seqlen, head_dim), or (tokens, heads, head_dim) if x is flat.
    """
    n_kv_head = getattr(attn, "num_kv_heads", attn.num_heads)
    weight, bias, counts = attn.in_proj_weight, attn.in_proj_bias, (attn.num_heads, n_kv_head, n_kv_head)
    if parts != "qkv":
        first = attn.num_heads * attn.head_dim
        rows = slice(first) if parts == "q" else slice(first, None)
        weight, bias = weight[rows], None if bias is None else bias[rows]
        counts = counts[:1] if parts == "q" else counts[1:]
    heads = linear(x, weight, bias).unflatten(-1, (-1, attn.head_dim))
    if getattr(attn, "q_norm", None) is None:
        return (heads.transpose(1, 2) if heads.dim() == 4 else heads).split(counts, 1)
    norms = {"qkv": (attn.q_norm, attn.k_norm, None), "q": (attn.q_norm,), "kv": (attn.k_norm, None)}[parts]
    split = (_norm_heads(t, norm) for t, norm in zip(heads.split(counts, -2), norms, strict=True))
    return tuple(t.transpose(1, 2) if t.dim() == 4 else t for t in split)


def _norm_heads(x, norm):
    """Norm (..., heads, head_dim) over each head, or over all of them if the norm is so wide."""
    if norm is None or norm.normalized_shape == x.shape[-1:]:
        return x if norm is None else norm(x)
    return norm(x.flatten(-2)).view(x.shape)


def merge_heads(out):
    """The inverse of the view that `project` returns: (..., heads * head_dim)."""
    return (out.transpose(1, 2) if out.dim() == 4 else out).flatten(-2)


def compose(block, x, self_attend, cross_attend=None):
    """Run a block by calling its children, with the given functions for SA and CA."""
    if getattr(block, "parallel", False):
        h = block.norm1(x)
        return x + block.dropout1(self_attend(h)) + block.dropout2(_feed_forward(block, h))
    sublayers = [self_attend, *([] if cross_attend is None else [cross_attend]), lambda x: _feed_forward(block, x)]
    for number, sublayer in enumerate(sublayers, 1):
        norm, drop = getattr(block, f"norm{number}", None), getattr(block, f"dropout{number}")
        norm_out = getattr(block, f"norm{number}_out", None)
        out = sublayer(norm(x) if block.norm_first else x)
        x = x + drop(out if norm_out is None else norm_out(out))
        if not block.norm_first and norm is not None:
            x = norm(x)
    return x


def _feed_forward(block, x):
    gate, up = getattr(block, "gate", None), block.linear1(x)
    hidden = block.activation(up) if gate is None else block.activation(gate(x)) * up
    return block.linear2(block.dropout(hidden))


class Attention(nn.Module):
    """Multi-head attention with the switches of a Shape; the `Sequences` supply the positions.

    Parameters are named as in torch.nn.MultiheadAttention; in_proj_weight holds n_head heads of queries, then
    n_kv_head heads of keys and n_kv_head heads of values.

    Args:
        shape: Shape.
        layer: number of the layer, which decides its window; None for attention to a memory.
    Source: Vaswani et al., "Attention is all you need", 2017; Ainslie et al., "GQA", 2023; for the switches see Shape.
    """

    def __init__(self, shape, layer):
        super().__init__()
        self.embed_dim, self.num_heads, self.num_kv_heads = shape.d_model, shape.n_head, shape.kv_heads
        self.head_dim, self.dropout = shape.head_width, shape.dropout
        self.scores = shape.scores_of(layer or 0)
        if layer is None:
            self.scores = self.scores._replace(window=None, local=False)
        rows = (shape.n_head + 2 * shape.kv_heads) * self.head_dim
        has_bias = shape.bias if shape.qkv_bias is None else shape.qkv_bias
        self.in_proj_weight = nn.Parameter(torch.empty(rows, shape.d_model))
        self.in_proj_bias = nn.Parameter(torch.zeros(rows)) if has_bias else None
        self.out_proj = nn.Linear(shape.n_head * self.head_dim, shape.d_model, bias=shape.bias)
        self.sink = nn.Parameter(torch.zeros(shape.n_head)) if shape.sinks and layer is not None else None
        self.q_norm = self.k_norm = None
        if shape.qk_norm != "none":
            together = shape.qk_norm == "all"
            self.q_norm = make_norm(shape, self.head_dim * (shape.n_head if together else 1))
            self.k_norm = make_norm(shape, self.head_dim * (shape.kv_heads if together else 1))
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x, sequences, memory=None):
        """x attends to itself, or to memory; sequences are those of the keys. x as for `run_block`; returns like x."""
        q, k, v = self._heads(x, sequences, memory)
        dropout_p = self.dropout if self.training else 0.0
        return self.out_proj(merge_heads(sequences.attend(q, k, v, dropout_p, self.scores, self.sink)))

    def weights(self, x, sequences, memory=None):
        """(batch, n_head, seqlen_q, seqlen_k): the attention weights of `forward`, without dropout."""
        q, k, _ = self._heads(x, sequences, memory)
        return attention_weights(q, k, sequences.mask_of(self.scores.window), self.scores, self.sink)

    def _heads(self, x, sequences, memory):
        if memory is None:
            q, k, v = project(self, x)
            return *sequences.rotate(q, k, self.scores.local), v
        return *project(self, x, "q"), *project(self, memory, "kv")


def normalise(norm, x, **options):
    """The fused op of a plain LayerNorm or RMSNorm, with its options (residual, dropout_p, return_residual)."""
    if isinstance(norm, nn.RMSNorm):
        return rms_norm(x, norm.weight, norm.eps, **options)
    return layer_norm(x, *affine(norm), norm.eps, **options)


class Block(nn.Module):
    """An encoder or decoder block like torch.nn's that also has all switches of a Shape.

    The feed-forward block is linear2(dropout(activation(linear1(x)))), or if gated
    linear2(dropout(activation(gate(x)) * linear1(x))).

    Args:
        shape: Shape.
        layer: number of the layer, which decides its window.
        cross: whether there is cross-attention.
    Source: as for Shape.
    """

    def __init__(self, shape, layer, cross):
        super().__init__()
        self.use_torch, self.norm_first, self.parallel = shape.layers == "torch", shape.norm_first, shape.parallel
        self.activation_name, gated = FEED_FORWARDS[shape.feed_forward]
        self.activation = reference.ACTIVATIONS[self.activation_name]
        d_model, d_ff, bias, dropout = shape.d_model, shape.hidden, shape.bias, shape.dropout
        self.self_attn = Attention(shape, layer)
        if cross:
            self.multihead_attn = Attention(shape, None)
        self.linear1 = nn.Linear(d_model, d_ff, bias=bias)
        self.gate = nn.Linear(d_model, d_ff, bias=bias) if gated else None
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(d_ff, d_model, bias=bias)
        self.numbers = range(1, 4 if cross else 3)
        self.norm_names = []
        for number in self.numbers:
            names = [f"norm{number}"] if shape.norm_first or shape.post_norm else []
            names += [f"norm{number}_out"] if shape.norm_output else []
            for name in names if number == 1 or not shape.parallel else ():
                setattr(self, name, make_norm(shape, d_model))
                self.norm_names.append(name)
            setattr(self, f"dropout{number}", nn.Dropout(dropout))

    def forward(self, x, sequences, memory=None, memory_sequences=None):
        """x as for `run_block`; memory (batch, seqlen_memory, d_model) with its own Sequences; returns like x."""

        def self_attend(x):
            return self.self_attn(x, sequences)

        def cross_attend(x):
            return self.multihead_attn(x, memory_sequences, memory)

        attends = (self_attend,) if memory is None else (self_attend, cross_attend)
        if self.use_torch or not self._is_plain():
            return compose(self, x, *attends)
        m, sublayers = self._modules, [*attends, self._feed_forward]
        if self.parallel:
            h = normalise(m["norm1"], x)
            x = dropout(self_attend(h), dropout_p(m["dropout1"]), residual=x)
            return dropout(self._feed_forward(h), dropout_p(m["dropout2"]), residual=x)
        if self.norm_first:
            return self._pre_norm(x, sublayers)
        for number, sublayer in enumerate(sublayers, 1):
            out, p = sublayer(x), dropout_p(m[f"dropout{number}"])
            if f"norm{number}_out" in m:
                x = dropout(normalise(m[f"norm{number}_out"], out), p, residual=x)
            else:  # the op returns the dtype of its input, torch that of the sum
                x = normalise(m[f"norm{number}"], out.to(x.dtype), residual=x, dropout_p=p)
        return x

    def _pre_norm(self, x, sublayers):
        m = self._modules
        h = normalise(m["norm1"], x)
        for number, sublayer in enumerate(sublayers, 1):
            out, p = sublayer(h), dropout_p(m[f"dropout{number}"])
            if f"norm{number}_out" in m:
                out = normalise(m[f"norm{number}_out"], out)
            if number == len(sublayers):
                return dropout(out, p, residual=x)
            h, x = normalise(m[f"norm{number + 1}"], out, residual=x, dropout_p=p, return_residual=True)
        return x

    def _is_plain(self):
        linears = ("linear1", "linear2") if self.gate is None else ("linear1", "gate", "linear2")
        dropouts, m = ("dropout", *(f"dropout{number}" for number in self.numbers)), self._modules
        return are_plain(m, linears, dropouts, ()) and all(is_plain(m[name], *_ALL_NORMS) for name in self.norm_names)

    def _feed_forward(self, x):
        m, gate = self._modules, self.gate
        w_gate, b_gate = (None, None) if gate is None else affine(gate)
        return feed_forward(
            x, *affine(m["linear1"]), *affine(m["linear2"]), activation=self.activation_name, w_gate=w_gate,
            b_gate=b_gate, dropout_p=dropout_p(m["dropout"]),
        )  # fmt: skip
