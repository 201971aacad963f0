"""A cache of keys and values, so that a new token costs one row instead of the whole sequence."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.nn import RotaryEmbedding
from fastattn.nn.plain import is_plain
from fastattn.ops import attention_decode
from fastattn.ops import layer as layer_op
from fastattn.ops._gemm import serves_rows

from .block import compose, merge_heads, project
from .decoding import convert_head, convert_layers, read_layers
from .rotary import ScaledRotary
from .sequences import torch_attention
from .shape import Scores

_AT_ONCE = 64  # the most new tokens in a call with converted weights


class KeyValueCache:
    """The cache of a Backbone, such as a CausalLM or the decoder of a Seq2Seq, for sequences of equal length.

    Args:
        model: the Backbone; the cache holds up to its block_size tokens.
        batch: number of sequences.
        memory, memory_lengths: None, or (batch, seqlen_memory, d_model) and (batch,) int64 for cross-attention; the
            keys and values of the memory are computed here, once.
        weights: None, or "bf16" or "int8": read the weights of the blocks and of the output layer in that dtype, with
            fp32 activations and sums. The copies are made here and do not follow later changes of the model, nor do the
            cached keys and values: make a new cache then. int8 is symmetric with a scale for each output channel.
    Raises:
        ValueError: weights is unknown, or it is given for a model that is not in fp32 on the CPU, has layers other than
            "fastattn", or has children that are not plain.
    Example:
        cache = KeyValueCache(model, batch=1)
        logits = model(prompt, cache=cache)  # then, for each new token (1, 1): model(token, cache=cache)
    """

    def __init__(
        self,
        model: Any,
        batch: int,
        memory: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        weights: str | None = None,
    ) -> None:
        if weights not in (None, *layer_op.WEIGHTS):
            raise ValueError(f"weights must be None, 'bf16' or 'int8', got {weights!r}")
        attn = model.blocks[0].self_attn
        weight = attn.out_proj.weight
        n_kv_head = getattr(attn, "num_kv_heads", attn.num_heads)
        shape = (len(model.blocks), batch, n_kv_head, model.block_size, attn.head_dim)
        with torch.inference_mode(False):  # an inference tensor could not be written to outside inference mode
            self.k = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
            self.v = torch.zeros_like(self.k)
        self.length = 0
        self._layers: Any = None
        self._head: Any = None
        if weights is not None:
            with torch.inference_mode(False), torch.no_grad():
                self._layers = convert_layers(model.blocks, weights)
                self._head = convert_head(model, weights)
        self.memory = [None] * len(model.blocks)
        if memory is not None:
            self.memory = [project(block.multihead_attn, memory, "kv") for block in model.blocks]
            self.memory_lengths = memory_lengths.to(torch.int32)
            self.memory_rows = torch.arange(batch, dtype=torch.int32, device=memory.device)

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i]; the number of rows may change."""
        with torch.inference_mode(False):
            self.k, self.v = self.k[:, rows], self.v[:, rows]
        if self.memory[0] is not None:  # only the index changes, not its keys and values
            self.memory_rows, self.memory_lengths = self.memory_rows[rows], self.memory_lengths[rows]

    def run_blocks(self, blocks: nn.ModuleList, x: Tensor, sequences: Any) -> Tensor:
        """Run the blocks of a model on new tokens, which see the cached tokens and, causally, each other.

        Args:
            blocks: of the model.
            x: (batch, seqlen, d_model), the embedded new tokens.
            sequences: their Sequences, causal and with start = self.length.
        Returns: like x.
        Raises:
            ValueError: x and the cache have different numbers of sequences.
        """
        if x.shape[0] != self.k.shape[1]:
            raise ValueError(f"KeyValueCache: the cache is for {self.k.shape[1]} sequences, got {x.shape[0]}")
        layers = self._few_token_layers(blocks, x, sequences.rotary)
        if layers is not None:
            return self._run_layers(layers, x, sequences)
        use_torch = sequences.use_torch
        lengths = torch.full(x.shape[:1], self.length, dtype=torch.int32, device=x.device)

        def self_attend(x, attn, k_cache, v_cache):
            q, k, v = project(attn, x)
            scores, sink = getattr(attn, "scores", Scores()), getattr(attn, "sink", None)
            q, k = sequences.rotate(q, k, scores.local)
            if use_torch:
                end = self.length + q.shape[2]
                k_cache[:, :, self.length : end] = k
                v_cache[:, :, self.length : end] = v
                mask = sequences.mask_of(scores.window)
                out = torch_attention(q, k_cache[:, :, :end], v_cache[:, :, :end], mask, scores, sink)
            else:
                slopes = sequences.alibi_slopes
                out = attention_decode(
                    q, k_cache, v_cache, k=k, v=v, cache_seqlens=lengths, alibi_slopes=slopes, sink=sink,
                    window=sequences.window(scores), softcap=scores.softcap, scale=scores.scale,
                )  # fmt: skip
            return attn.out_proj(merge_heads(out))

        for block, k, v, memory in zip(blocks, self.k, self.v, self.memory, strict=True):
            attends = [partial(self_attend, attn=block.self_attn, k_cache=k, v_cache=v)]
            if memory is not None:
                attends.append(
                    partial(self._cross_attend, attn=block.multihead_attn, memory=memory, use_torch=use_torch)
                )
            x = compose(block, x, *attends)
        self.length += x.shape[1]
        return x

    def _few_token_layers(self, blocks, x, rotary):
        """The layers for the op that computes a whole layer, or None where the children are called."""
        is_served = layer_op.serves(x, self.k.shape[-1]) and (
            rotary is None or is_plain(rotary, RotaryEmbedding, ScaledRotary)
        )
        if self._layers is not None:
            if is_served:
                return self._layers
            raise RuntimeError(
                "KeyValueCache: converted weights need fp32 tokens, no gradients, no autocast, no trace, CPU kernels"
                " and a plain rotary embedding"
            )
        if not is_served or not serves_rows(x.shape[0] * x.shape[1]) or self.memory[0] is not None:
            return None
        return read_layers(blocks)

    def _run_layers(self, layers, x, sequences):
        at_once = self._layers is None or x.shape[0] * x.shape[1] <= _AT_ONCE
        step = x.shape[1] if at_once else max(1, _AT_ONCE // x.shape[0])
        slopes, rotary = sequences.alibi_slopes, sequences.rotary
        positions = layer_op.Positions(None, None, False, slopes)
        if rotary is not None:
            tables = rotary.tables(self.length + x.shape[1], x)
            positions = layer_op.Positions(*tables, rotary.interleaved, slopes)
        parts, length = [], self.length
        for part in x.split(step, 1) if x.shape[1] else [x]:
            lengths = torch.full(x.shape[:1], length, dtype=torch.int32)
            for layer, k, v in zip(layers, self.k.unbind(), self.v.unbind(), strict=True):
                part = layer_op.decode_layer(part, layer, layer_op.Cache(k, v, lengths), positions)
            length += part.shape[1]
            parts.append(part)
        self.length = length
        torch.autograd.graph.increment_version((self.k, self.v))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def logits(self, x: Tensor) -> Tensor | None:
        """The output layer with converted weights: x (..., d_model) -> (..., vocab_size); None without such weights."""
        return None if self._head is None else layer_op.few_rows_linear(x, self._head)

    def _cross_attend(self, x, attn, memory, use_torch):
        (q,), (k, v) = project(attn, x, "q"), memory
        scores = getattr(attn, "scores", Scores())
        if use_torch:
            seen = torch.arange(k.shape[2], device=k.device) < self.memory_lengths[:, None]
            rows = self.memory_rows.long()
            out = torch_attention(q, k[rows], v[rows], seen[:, None, None], scores)
        else:
            out = attention_decode(
                q, k, v, cache_seqlens=self.memory_lengths, cache_batch_idx=self.memory_rows, causal=False,
                softcap=scores.softcap, scale=scores.scale,
            )  # fmt: skip
        return attn.out_proj(merge_heads(out))
