"""The residual blocks of all models: the layers of torch.nn or fastattn.nn, or `Block` for features that they lack.

    post-norm: x = norm1(x + dropout1(SA(x)));  [x = norm2(x + dropout2(CA(x, memory)));]  x = norm(x + dropout(FF(x)))
    pre-norm:  the norms come before SA, CA and FF instead

The functions here take any of these, since the children have the same names.
"""

import torch
from torch import nn

from fastattn import reference
from fastattn.nn.decoder import TransformerDecoderLayer
from fastattn.nn.encoder import TransformerEncoderLayer
from fastattn.nn.norm import LayerNorm
from fastattn.nn.plain import affine, dropout_p
from fastattn.nn.sublayers import add_norm, add_norm_keep_sum, are_plain
from fastattn.ops import dropout, feed_forward, layer_norm
from fastattn.ops.linear import linear

# name → (activation, whether a second input layer gates the hidden layer)
FEED_FORWARDS = {
    "gelu": ("gelu", False), "gelu_tanh": ("gelu_tanh", False), "relu": ("relu", False), "silu": ("silu", False),
    "swiglu": ("silu", True), "geglu": ("gelu", True), "reglu": ("relu", True),
}  # fmt: skip


def make_block(
    d_model, n_head, n_kv_head, d_ff, dropout, bias, norm_first, feed_forward, norm_eps, custom_block, cross, layers
):  # fmt: skip
    """A block from `layers`, with cross-attention if `cross`; custom_block: the attention needs our `Block`."""
    activation, gated = FEED_FORWARDS[feed_forward]
    if custom_block or gated or n_kv_head != n_head or activation not in ("gelu", "relu"):
        return Block(
            d_model, n_head, n_kv_head, d_ff, dropout, bias, norm_first, activation, gated, norm_eps, cross, layers
        )
    if layers == "torch":
        layer = nn.TransformerDecoderLayer if cross else nn.TransformerEncoderLayer
    else:
        layer = TransformerDecoderLayer if cross else TransformerEncoderLayer
    return layer(
        d_model, n_head, d_ff, dropout, activation, norm_eps, batch_first=True, norm_first=norm_first, bias=bias
    )


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
        rows = slice(attn.embed_dim) if parts == "q" else slice(attn.embed_dim, None)
        weight, bias = weight[rows], None if bias is None else bias[rows]
        counts = counts[:1] if parts == "q" else counts[1:]
    heads = linear(x, weight, bias).unflatten(-1, (-1, attn.head_dim))
    return (heads.transpose(1, 2) if heads.dim() == 4 else heads).split(counts, 1)


def merge_heads(out):
    """The inverse of the view that `project` returns: (..., heads * head_dim)."""
    return (out.transpose(1, 2) if out.dim() == 4 else out).flatten(-2)


def compose(block, x, self_attend, cross_attend=None):
    """Run a block by calling its children, with the given functions for SA and CA."""
    sublayers = [self_attend, *([] if cross_attend is None else [cross_attend]), lambda x: _feed_forward(block, x)]
    for number, sublayer in enumerate(sublayers, 1):
        norm, drop = getattr(block, f"norm{number}"), getattr(block, f"dropout{number}")
        x = x + drop(sublayer(norm(x))) if block.norm_first else norm(x + drop(sublayer(x)))
    return x


def _feed_forward(block, x):
    gate, up = getattr(block, "gate", None), block.linear1(x)
    hidden = block.activation(up) if gate is None else block.activation(gate(x)) * up
    return block.linear2(block.dropout(hidden))


class Attention(nn.Module):
    """Multi-head attention whose keys and values may have fewer heads; the `Sequences` supply the positions.

    Parameters are named as in torch.nn.MultiheadAttention; in_proj_weight holds n_head heads of queries, then
    n_kv_head heads of keys and n_kv_head heads of values.
    Source: Vaswani et al., "Attention is all you need", 2017; Ainslie et al., "GQA", 2023.
    """

    def __init__(self, d_model, n_head, n_kv_head, dropout, bias):
        super().__init__()
        self.embed_dim, self.num_heads, self.num_kv_heads, self.dropout = d_model, n_head, n_kv_head, dropout
        self.head_dim = d_model // n_head
        rows = (n_head + 2 * n_kv_head) * self.head_dim
        self.in_proj_weight = nn.Parameter(torch.empty(rows, d_model))
        self.in_proj_bias = nn.Parameter(torch.zeros(rows)) if bias else None
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x, sequences, memory=None):
        """x attends to itself, or to memory; sequences are those of the keys. x as for `run_block`; returns like x."""
        q, k, v = self._heads(x, sequences, memory)
        return self.out_proj(merge_heads(sequences.attend(q, k, v, self.dropout if self.training else 0.0)))

    def weights(self, x, sequences, memory=None):
        """(batch, n_head, seqlen_q, seqlen_k): the attention weights of `forward`, without dropout."""
        q, k, _ = self._heads(x, sequences, memory)
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * self.head_dim**-0.5
        mask = sequences.mask
        return (scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask).softmax(-1)

    def _heads(self, x, sequences, memory):
        if memory is None:
            q, k, v = project(self, x)
            return *sequences.rotate(q, k), v
        return *project(self, x, "q"), *project(self, memory, "kv")


class Block(nn.Module):
    """An encoder or decoder block like torch.nn's that also has grouped heads, rotary positions, ALiBi and gates.

    Args:
        d_model, n_head, n_kv_head, d_ff: width, heads of queries, heads of keys and values, hidden width.
        dropout: probability on the attention weights, the hidden layer and the residual branches.
        bias: whether linear layers and norms have biases.
        norm_first: pre-norm.
        activation, gated: the feed-forward block is linear2(dropout(activation(linear1(x)))), or if gated
            linear2(dropout(activation(gate(x)) * linear1(x))).
        norm_eps: added to the variance in norms.
        cross: whether there is cross-attention.
        layers: "fastattn" or "torch".
    Source: Shazeer, "GLU variants improve transformer", 2020, for the gates.
    """

    def __init__(
        self, d_model, n_head, n_kv_head, d_ff, dropout, bias, norm_first, activation, gated, norm_eps, cross, layers
    ):  # fmt: skip
        super().__init__()
        self.use_torch, self.norm_first = layers == "torch", norm_first
        self.activation_name, self.activation = activation, reference.ACTIVATIONS[activation]
        self.self_attn = Attention(d_model, n_head, n_kv_head, dropout, bias)
        if cross:
            self.multihead_attn = Attention(d_model, n_head, n_kv_head, dropout, bias)
        self.linear1 = nn.Linear(d_model, d_ff, bias=bias)
        self.gate = nn.Linear(d_model, d_ff, bias=bias) if gated else None
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(d_ff, d_model, bias=bias)
        norm = nn.LayerNorm if self.use_torch else LayerNorm
        self.numbers = range(1, 4 if cross else 3)
        for number in self.numbers:
            setattr(self, f"norm{number}", norm(d_model, norm_eps, bias=bias))
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
        norms = [getattr(self, f"norm{number}") for number in self.numbers]
        dropouts = [getattr(self, f"dropout{number}") for number in self.numbers]
        if not self.norm_first:
            for attend, drop, norm in zip(attends, dropouts, norms, strict=False):
                x = add_norm(attend(x), None, x, drop, norm)
            return add_norm(self._feed_forward(x), None, x, dropouts[-1], norms[-1])
        h = layer_norm(x, *affine(norms[0]), norms[0].eps)
        for attend, drop, norm in zip(attends, dropouts, norms[1:], strict=False):
            h, x = add_norm_keep_sum(attend(h), None, x, drop, norm)
        return dropout(self._feed_forward(h), dropout_p(dropouts[-1]), residual=x)

    def _is_plain(self):
        linears = ("linear1", "linear2") if self.gate is None else ("linear1", "gate", "linear2")
        dropouts = ("dropout", *(f"dropout{number}" for number in self.numbers))
        return are_plain(self._modules, linears, dropouts, [f"norm{number}" for number in self.numbers])

    def _feed_forward(self, x):
        m, gate = self._modules, self.gate
        w_gate, b_gate = (None, None) if gate is None else affine(gate)
        return feed_forward(
            x, *affine(m["linear1"]), *affine(m["linear2"]), activation=self.activation_name, w_gate=w_gate,
            b_gate=b_gate, dropout_p=dropout_p(m["dropout"]),
        )  # fmt: skip
