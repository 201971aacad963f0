"""An encoder-decoder with one vocabulary: it reads a source and writes a target."""

from typing import Any

import torch
from torch import Tensor, nn

from .backbone import Backbone, Head, num_parameters
from .initialize import initialize
from .kv_cache import KeyValueCache
from .search import beam_search, greedy_search


class Seq2Seq(nn.Module):
    """Predicts the next token of a target from those before it and from a source.

    Source and target share the embedding, which is the output layer too if tied; each side has its own positions and
    n_layer blocks, and cross-attention knows none.

    Args:
        vocab_size, tied, init, label_smoothing: as for `CausalLM`.
        shape: the arguments of `Backbone`, for both sides.
    Raises:
        ValueError: as `CausalLM`.
    Source: Vaswani et al., "Attention is all you need", 2017.
    """

    num_parameters = num_parameters

    def __init__(
        self,
        vocab_size: int,
        *,
        tied: bool = True,
        init: str = "gpt2",
        label_smoothing: float = 0.0,
        **shape: Any,
    ) -> None:
        super().__init__()
        self.encoder = Backbone(vocab_size, **shape)
        embedding = self.encoder.token_embedding
        self.decoder = Backbone(vocab_size, cross=True, token_embedding=embedding, **shape)
        self.block_size, self.layers = self.encoder.block_size, self.encoder.layers
        self.head = Head(vocab_size, self.encoder.d_model, tied, label_smoothing, self.layers)
        initialize(self, init, len(self.encoder.blocks))

    def encode(self, source: Tensor, lengths: Tensor) -> Tensor:
        """The states (batch, seqlen, d_model) of source (batch, seqlen), padded on the right, of lengths (batch,)."""
        return self.encoder(source, lengths=lengths)

    def forward(
        self,
        source: Tensor,
        source_lengths: Tensor,
        target_in: Tensor,
        target_out: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next target token, or the mean loss when the next tokens are given.

        Args:
            source: (batch, seqlen_source) int64, padded on the right, at most block_size.
            source_lengths: (batch,) int64, tokens of each row, at least 1.
            target_in: (batch, seqlen) int64, the token that begins a target and the target, padded on the right.
            target_out: None or (batch, seqlen) int64, the target and the token that ends it, -100 where none counts.
        Returns: logits (batch, seqlen, vocab_size); with target_out their mean cross-entropy in nats, fp32.
        Raises:
            ValueError: as `Backbone`, and if the batches differ.
        """
        if len(source) != len(target_in):
            raise ValueError(f"target_in: expected {len(source)} rows, as source has, got {len(target_in)}")
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
        """The likeliest targets, greedily or by beam search; the mode of the model (training or evaluation) stays.

        Args:
            source, lengths: as for `encode`.
            begin, end: the tokens that begin and end a target.
            max_new_tokens: tokens of a target at most, no more than block_size.
            beams: candidates that are followed at a time; with 1 the most likely token is taken each time.
            length_penalty: candidates are compared by log-probability / length ** length_penalty.
            use_cache: keep keys and values instead of reading everything again for each token.
        Returns: for each source the list of its target's tokens, without begin and end.
        Raises:
            ValueError: as `Backbone`, or numbers out of range.
        """
        if not 1 <= max_new_tokens <= self.block_size:
            raise ValueError(f"max_new_tokens: expected from 1 to block_size = {self.block_size}, got {max_new_tokens}")
        if beams < 1:
            raise ValueError(f"beams: expected at least 1, got {beams}")
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
    """The logits after each of a batch of growing targets, for the searches."""

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
