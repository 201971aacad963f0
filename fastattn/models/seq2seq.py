"""An encoder-decoder with one vocabulary, which reads a source and generates a target."""

from typing import Any

import torch
from torch import Tensor, nn

from .backbone import Backbone, Head, num_parameters
from .initialize import initialize
from .kv_cache import KeyValueCache
from .search import beam_search, greedy_search


class Seq2Seq(nn.Module):
    """Predicts the next token of a target from its earlier tokens and from a source.

    Source and target share the embedding, which is also the output layer if tied. Each side has its own positions and
    n_layer blocks; cross-attention uses no positions.

    Args:
        vocab_size, tied, init, label_smoothing: as for `CausalLM`.
        shape: the fields of `Shape`, for both sides.
    Raises:
        ValueError: as `CausalLM`.
    Example:
        model = Seq2Seq(4000, n_layer=2, n_head=4, d_model=128, block_size=80)
        targets = model.generate(source, lengths, begin=2, end=3, max_new_tokens=40, beams=4)
    Source: Vaswani et al., "Attention is all you need", 2017.
    """

    num_parameters = num_parameters

    def __init__(
        self, vocab_size: int, *, tied: bool = True, init: str = "gpt2", label_smoothing: float = 0.0, **shape: Any
    ) -> None:
        super().__init__()
        self.encoder = Backbone(vocab_size, **shape)
        embedding = self.encoder.token_embedding
        self.decoder = Backbone(vocab_size, cross=True, token_embedding=embedding, **shape)
        self.block_size, self.layers = self.encoder.block_size, self.encoder.layers
        self.head = Head(vocab_size, self.encoder.shape, tied, label_smoothing)
        initialize(self, init, len(self.encoder.blocks))

    def encode(self, source: Tensor, lengths: Tensor) -> Tensor:
        """The hidden states (batch, seqlen, d_model) of source (batch, seqlen), right-padded, with lengths (batch,)."""
        return self.encoder(source, lengths=lengths)

    def forward(
        self,
        source: Tensor,
        source_lengths: Tensor,
        target_in: Tensor,
        target_out: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next target token, or the mean loss if target_out is given.

        Args:
            source: (batch, seqlen_source) int64, padded on the right, at most block_size tokens.
            source_lengths: (batch,) int64, the number of tokens in each row, at least 1.
            target_in: (batch, seqlen) int64, the begin token and the target, padded on the right.
            target_out: None or (batch, seqlen) int64, the target and the end token; -100 is ignored.
        Returns: logits (batch, seqlen, vocab_size); with target_out their mean cross-entropy in nats, fp32.
        Raises:
            ValueError: as `Backbone`; source and target_in have different numbers of rows.
        """
        if source.shape[0] != target_in.shape[0]:  # len() would fix the batch of an exported program
            raise ValueError(f"target_in must have {source.shape[0]} rows like source, got {target_in.shape[0]}")
        memory = self.encode(source, source_lengths)
        x = self.decoder(target_in, causal=True, memory=memory, memory_lengths=source_lengths)
        return self.head(x, self.encoder.token_embedding, target_out)

    @torch.no_grad()
    def generate(
        self,
        source: Tensor,
        lengths: Tensor,
        *,
        begin: int,
        end: int,
        max_new_tokens: int,
        beams: int = 1,
        length_penalty: float = 1.0,
        use_cache: bool = True,
    ) -> list[list[int]]:
        """The likeliest targets by greedy or beam search; the model's mode (training or evaluation) does not change.

        Args:
            source, lengths: as for `encode`.
            begin, end: the tokens that begin and end a target.
            max_new_tokens: the most tokens in a target, at most block_size.
            beams: candidates kept for each source; 1 is greedy search.
            length_penalty: candidates are compared by log-probability / length ** length_penalty.
            use_cache: cache keys and values instead of reading all tokens again for each new one.
        Returns: for each source the list of its target's tokens, without begin and end.
        Raises:
            ValueError: as `Backbone`; a number is out of range.
        """
        if not 1 <= max_new_tokens <= self.block_size:
            raise ValueError(f"max_new_tokens must be from 1 to block_size = {self.block_size}, got {max_new_tokens}")
        if beams < 1:
            raise ValueError(f"beams must be at least 1, got {beams}")
        was_training = self.training
        self.eval()
        try:
            next_logits = _NextLogits(self, self.encode(source, lengths), lengths, use_cache)
            tokens = torch.full((len(source), 1), begin, device=source.device)
            if beams == 1:
                return greedy_search(next_logits, tokens, max_new_tokens, stop=(end,))
            return beam_search(
                next_logits, tokens, max_new_tokens, beams=beams, length_penalty=length_penalty, stop=(end,)
            )
        finally:
            self.train(was_training)


class _NextLogits:
    """The logits after each target of a batch, for the searches."""

    def __init__(self, model, memory, lengths, use_cache):
        self.model, self.memory, self.lengths, self.cache = model, memory, lengths, None
        if use_cache:
            self.cache = KeyValueCache(model.decoder, len(memory), memory, lengths)

    def __call__(self, tokens):
        decoder = self.model.decoder
        if self.cache is None:
            x = decoder(tokens, causal=True, memory=self.memory, memory_lengths=self.lengths)
        else:
            x = decoder(tokens[:, self.cache.length :], causal=True, cache=self.cache)
        return self.model.head(x[:, -1], decoder.token_embedding)

    def reorder(self, rows):
        if self.cache is None:
            self.memory, self.lengths = self.memory[rows], self.lengths[rows]
        else:
            self.cache.reorder(rows)
