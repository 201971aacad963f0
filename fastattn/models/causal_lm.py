"""A language model in the shape of GPT-2: token and position embeddings, pre-norm blocks, a final norm, tied weights.

Shape and initialisation: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

from typing import Any

from torch import Tensor

from .backbone import Backbone, Head, num_parameters
from .initialize import initialize


class CausalLM(Backbone):
    """Predicts the next token from all tokens before it.

    Args:
        vocab_size: number of distinct tokens.
        tied: whether the output layer is the embedding.
        init: how matrices are initialized, see `initialize`.
        label_smoothing: share of a target's probability that is spread over the vocabulary, in training mode only.
        shape: the fields of `Shape`.
    Raises:
        ValueError: as `Backbone`; label_smoothing is out of range or init is unknown.
    Example:
        model = CausalLM(50257, n_layer=12, n_head=12, d_model=768, block_size=1024)
        loss = model(tokens[:, :-1], tokens[:, 1:])  # tokens: (batch, seqlen + 1) int64
    """

    num_parameters = num_parameters

    def __init__(
        self, vocab_size: int, *, tied: bool = True, init: str = "gpt2", label_smoothing: float = 0.0, **shape: Any
    ) -> None:
        super().__init__(vocab_size, **shape)
        self.head = Head(vocab_size, self.shape, tied, label_smoothing)
        initialize(self, init, len(self.blocks))

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: Any = None,
        cu_seqlens: Tensor | None = None,
        last: bool = False,
    ) -> Tensor:
        """Logits of the next token, or the mean loss if targets are given.

        Args:
            tokens, cache, cu_seqlens: as for `Backbone`; cache and cu_seqlens exclude each other.
            targets: None or (batch, seqlen) int64, the next token at each position; -100 is ignored.
            last: compute only the logits after the last token, (batch, 1, vocab_size).
        Returns: logits (batch, seqlen, vocab_size); with targets their mean cross-entropy in nats per token, fp32.
        Raises:
            ValueError: as `Backbone`; targets are given with last.
        """
        if last and targets is not None:
            raise ValueError("targets must be None with last, which leaves out the logits of all other tokens")
        if cache is not None and cu_seqlens is not None:
            raise ValueError("cu_seqlens must be None with a cache, which holds one document per row")
        x = super().forward(tokens, causal=True, cu_seqlens=cu_seqlens, cache=cache)
        x = x[:, -1:] if last else x
        logits = None if cache is None or targets is not None else cache.logits(x)
        return self.head(x, self.token_embedding, targets) if logits is None else logits
