"""The parts that all transformer models share: embeddings with positions, blocks, the output layer and its loss."""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastattn.nn import LayerNorm
from fastattn.nn.plain import dropout_p
from fastattn.nn.sublayers import are_plain
from fastattn.ops import dropout, linear_cross_entropy
from fastattn.ops.linear import linear

from .block import make_block, make_norm, run_block
from .rotary import RotaryConfig, make_rotary
from .sequences import Sequences
from .shape import Shape


def sinusoids(block_size, d_model):
    """(block_size, d_model): sines of the position at wavelengths from 2π to 20000π, then the cosines.

    Source: Vaswani et al., "Attention is all you need", 2017, section 3.5; sines and cosines alternate there.
    """
    frequency = 10000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    angle = torch.outer(torch.arange(block_size, dtype=torch.float64), frequency)
    return torch.cat([angle.sin(), angle.cos()], 1).float()


def alibi_slopes(n_head):
    """(n_head,): 2^(-8 h / n) for heads h = 1 to n, the power of two up to n_head; then slopes between these.

    Source: Press et al., "Train short, test long", 2022, and their implementation for other numbers of heads.
    """
    n = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * h / n) for h in range(1, n + 1)]
    return torch.tensor(slopes + [2 ** (-4 * h / n) for h in range(1, 2 * (n_head - n), 2)])


class Backbone(nn.Module):
    """A transformer without an output layer.

    Args:
        vocab_size: number of distinct tokens.
        cross: whether the blocks also attend to a memory, as in a decoder.
        token_embedding: None, or the nn.Embedding of another model to share.
        shape: the fields of `Shape`.
    Raises:
        ValueError: as `Shape`; parallel blocks are to attend to a memory.
    """

    def __init__(self, vocab_size, *, cross=False, token_embedding=None, **shape):
        super().__init__()
        self.shape = shape = Shape(**shape)
        if cross and shape.parallel:
            raise ValueError("parallel must be False in a decoder with a memory, got True")
        self.block_size, self.d_model, self.layers = shape.block_size, shape.d_model, shape.layers
        self.checkpointing = shape.checkpointing
        d_model = shape.d_model
        self.token_embedding = nn.Embedding(vocab_size, d_model) if token_embedding is None else token_embedding
        learned = shape.positions == "learned"
        self.position_embedding = nn.Embedding(shape.block_size, d_model) if learned else None
        self.rotary = self.local_rotary = None
        if shape.positions == "rotary":
            self.rotary = make_rotary(shape.head_width, shape.block_size, shape.rotary)
            if shape.rotary.local_base is not None:
                local = RotaryConfig(shape.rotary.local_base)
                self.local_rotary = make_rotary(shape.head_width, shape.block_size, local)
        self._make_table = {
            "sinusoidal": partial(sinusoids, shape.block_size, d_model), "alibi": partial(alibi_slopes, shape.n_head)
        }.get(shape.positions)  # fmt: skip
        self.register_buffer("sinusoids", None, persistent=False)
        self.register_buffer("alibi_slopes", None, persistent=False)
        self._table = {"sinusoidal": "sinusoids", "alibi": "alibi_slopes"}.get(shape.positions)
        self._fill_table()
        self.dropout = nn.Dropout(shape.dropout)
        self.embedding_norm = make_norm(shape, d_model) if shape.embedding_norm else None
        self.blocks = nn.ModuleList(make_block(shape, layer, cross) for layer in range(shape.n_layer))
        self.norm = make_norm(shape, d_model)

    def _fill_table(self, device=None):
        """Compute the position buffer, in fp32 even if the model is cast."""
        if self._table is not None:
            with torch.inference_mode(False):  # the table may be needed for training later
                setattr(self, self._table, self._make_table().to(device))

    def _apply(self, fn, recurse=True):
        before = self._buffers.get(self._table)
        super()._apply(fn, recurse)
        table = self._buffers.get(self._table)
        # share_memory changes the tensor itself; other functions may make a fake or distributed one
        if table is not before and type(table) is torch.Tensor:
            self._fill_table(table.device)  # a cast must not round it, to_empty must not lose it
        return self

    def forward(self, tokens, *, causal=False, lengths=None, cu_seqlens=None, memory=None, memory_lengths=None,
                cache=None):  # fmt: skip
        """The last hidden states of tokens.

        Args:
            tokens: (batch, seqlen) int64, seqlen at most block_size.
            causal: whether a token sees only itself and earlier tokens.
            lengths: None or (batch,) int64: the rest of each row is padding, which no token sees.
            cu_seqlens: None or (n + 1,) int32, 0 and the ends of the documents in the concatenated rows. Documents do
                not see each other, positions restart at each, and every row ends at the end of a document.
            memory, memory_lengths: (batch, seqlen_memory, d_model) for cross-attention, and its lengths (batch,).
            cache: None or a KeyValueCache, for evaluation without gradients: `tokens` follow the tokens in the cache
                and are added to it; the cache also holds the memory.
        Returns: (batch, seqlen, d_model).
        Raises:
            ValueError: tokens do not have 2 dimensions, are more than block_size with those in the cache, or do not fit
                lengths or cu_seqlens; the values of these two are checked on the CPU only, where it is free.
        """
        if self._table is not None and self._buffers[self._table].is_meta and not tokens.is_meta:
            self._fill_table(tokens.device)  # load_state_dict(assign=True) has filled everything else
        start = 0 if cache is None else cache.length
        check_tokens(tokens, self.block_size, start)
        check_lengths(lengths, tokens)
        check_documents(cu_seqlens, tokens)
        sequences = Sequences(
            self.layers, tokens, causal=causal, lengths=lengths, cu_seqlens=cu_seqlens, start=start,
            rotary=self.rotary, local_rotary=self.local_rotary, alibi_slopes=self.alibi_slopes,
        )  # fmt: skip
        x = self._embed(tokens, sequences.positions)
        if cache is not None:
            x = cache.run_blocks(self.blocks, x, sequences)
        else:
            x = self._run_blocks(x, sequences, memory, memory_lengths)
        return x if self.shape.post_norm else self.norm(x)

    def _run_blocks(self, x, sequences, memory, memory_lengths):
        shape, memory_sequences = x.shape, None
        if memory is not None:
            memory_sequences = Sequences(self.layers, memory[:, :, 0], lengths=memory_lengths)
        if sequences.flat:
            x = x.flatten(0, 1)
        for block in self.blocks:
            arguments = (block, x, sequences, memory, memory_sequences)
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(run_block, *arguments, use_reentrant=False)
            else:
                x = run_block(*arguments)
        return x.reshape(shape)

    def _embed(self, tokens, positions):
        """positions: an int, the position of every row's first token, or (batch, seqlen)."""
        x = self.token_embedding(tokens)
        table = self.sinusoids
        if table is not None or self.shape.embedding_scale:
            x = x * self.d_model**0.5
        if table is None and self.position_embedding is not None:
            table = self.position_embedding.weight
        if table is not None:
            if isinstance(positions, int):
                rows = table[positions : positions + tokens.shape[1]]
            else:
                rows = F.embedding(positions, table)
            x = x + rows.to(x.dtype)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        x = self.norm(x) if self.shape.post_norm else x
        plain = self.shape.layers == "fastattn" and are_plain(self._modules, (), ("dropout",), ())
        p = dropout_p(self.dropout) if plain else 0
        return dropout(x, p) if p else self.dropout(x)  # torch's draws its numbers on one thread


def check_tokens(tokens, block_size, start=0):
    """Raise ValueError unless tokens are rows that fit the model, after `start` earlier ones."""
    if tokens.dim() != 2:
        raise ValueError(f"tokens must have shape (batch, seqlen), got {tuple(tokens.shape)}")
    if start + tokens.shape[1] > block_size:
        raise ValueError(f"a row may have at most block_size = {block_size} tokens, got {start + tokens.shape[1]}")


def check_lengths(lengths, tokens, name="lengths"):
    """Raise ValueError unless lengths is None or has a length from 1 to seqlen for every row of tokens."""
    if lengths is None:
        return
    batch, seqlen = tokens.shape
    if tuple(lengths.shape) != (batch,):
        raise ValueError(f"{name} must have shape ({batch},), one length per row, got {tuple(lengths.shape)}")
    if lengths.is_cpu and batch and not torch.compiler.is_compiling():
        low, high = (x.item() for x in lengths.aminmax())
        if low < 1 or high > seqlen:
            raise ValueError(f"{name} must be from 1 to {seqlen}, got {low if low < 1 else high}")


def check_documents(cu_seqlens, tokens):
    """Raise ValueError unless cu_seqlens is None or divides the rows of tokens into documents."""
    if cu_seqlens is None:
        return
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"cu_seqlens must be int32 of shape (documents + 1,), got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.is_cpu and not torch.compiler.is_compiling():
        ends, seqlen = cu_seqlens.tolist(), tokens.shape[1]
        missing = set(range(0, tokens.numel() + 1, seqlen)) - set(ends)
        if missing or ends != sorted(ends) or ends[0] != 0 or ends[-1] != tokens.numel():
            raise ValueError(
                f"cu_seqlens must rise from 0 to {tokens.numel()} and include the end of every row of {seqlen} tokens,"
                f" got {ends if len(ends) < 20 else [*ends[:20], '...']}"
            )


class Head(nn.Module):
    """The output layer: from hidden states to logits, or to the mean cross-entropy of the targets.

    Args:
        vocab_size: rows of the matrix.
        shape: the Shape of the model; its logit_softcap bounds the logits.
        tied: whether the matrix is the embedding's.
        label_smoothing: share of a target's probability that is spread over the vocabulary, in training mode only.
        transform: whether a layer x = norm(gelu(dense(x))) comes before the matrix, which then has a bias.
    Raises:
        ValueError: label_smoothing is out of range.
    Source: Press and Wolf, "Using the output embedding to improve language models", 2017; Szegedy et al., "Rethinking
        the Inception architecture", 2016, for label smoothing; Devlin et al., "BERT", 2019, for the transform.
    """

    def __init__(self, vocab_size, shape, tied, label_smoothing, transform=False):
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
        self.label_smoothing, self.softcap, d_model = label_smoothing, shape.logit_softcap, shape.d_model
        self.loss = _linear_cross_entropy if shape.layers == "torch" else linear_cross_entropy
        self.weight = None if tied else nn.Parameter(torch.empty(vocab_size, d_model))
        self.dense = self.norm = self.bias = None
        if transform:
            self.dense = nn.Linear(d_model, d_model)
            self.norm = (nn.LayerNorm if shape.layers == "torch" else LayerNorm)(d_model, shape.norm_eps)
            self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x, embedding, targets=None):
        """x: (..., d_model); embedding: the nn.Embedding; targets: None or (...,) int64, where -100 is ignored.

        Returns: logits (..., vocab_size), or the mean loss in nats, fp32; 0 if every target is ignored.
        """
        if targets is not None:
            smoothing = self.label_smoothing if self.training else 0.0
            total = self._loss(x, embedding, targets, smoothing, "sum")
            return total / (targets != -100).sum().clamp_min(1)
        weight = embedding.weight if self.weight is None else self.weight
        return softcapped(linear(self._transform(x), weight, self.bias), self.softcap)

    def losses(self, x, embedding, targets):
        """The loss of each target in nats, like targets, without label smoothing; 0 where it is ignored."""
        return self._loss(x, embedding, targets, 0.0, "none").view(targets.shape)

    def _transform(self, x):
        return x if self.dense is None else self.norm(F.gelu(self.dense(x)))

    def _loss(self, x, embedding, targets, smoothing, reduction):
        weight = embedding.weight if self.weight is None else self.weight
        options = {"bias": self.bias, "label_smoothing": smoothing, "softcap": self.softcap}
        return self.loss(self._transform(x), weight, targets, reduction=reduction, **options)


def _linear_cross_entropy(x, weight, targets, *, bias, softcap, **options):
    logits = softcapped(linear(x, weight, bias).view(-1, len(weight)).float(), softcap)
    return F.cross_entropy(logits, targets.flatten(), **options)


def softcapped(logits, softcap):
    """softcap * tanh(logits / softcap), or the logits if softcap is 0."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def num_parameters(model: nn.Module) -> int:
    """Number of parameters, by convention without the position tables."""
    tables: list[Any] = [getattr(m, "position_embedding", None) for m in model.modules()]
    return sum(p.numel() for p in model.parameters()) - sum(t.weight.numel() for t in tables if t is not None)
