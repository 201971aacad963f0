"""A GPT-2 shaped language model: token and position embeddings, pre-norm blocks, a final norm, tied weights.

Shape and initialisation: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

import torch
import torch.nn.functional as F
from torch import nn

from .initialize import initialize


def layer_classes(layers):
    """The encoder layer and the norm of fastattn.nn or of torch.nn, and the loss that goes with them.

    Args:
        layers: "fastattn" or "torch".

    Returns:
        (TransformerEncoderLayer class, LayerNorm class, function (x, weight, targets) -> mean cross-entropy).

    Raises:
        ValueError: for any other name.
    """
    if layers == "torch":
        return nn.TransformerEncoderLayer, nn.LayerNorm, _linear_cross_entropy
    if layers == "fastattn":
        import fastattn.nn

        return fastattn.nn.TransformerEncoderLayer, fastattn.nn.LayerNorm, fastattn.linear_cross_entropy
    raise ValueError(f"layers: expected 'fastattn' or 'torch', got {layers!r}")


def _linear_cross_entropy(x, weight, targets):
    return F.cross_entropy(F.linear(x, weight).flatten(0, 1).float(), targets.flatten())


class CausalLM(nn.Module):
    """Predicts the next token from all tokens before it.

    Parameters carry the same names, and one seed gives bitwise the same initial weights, for both values of `layers`.

    Args:
        vocab_size: number of distinct tokens.
        n_layer, n_head, d_model: depth, heads of a layer, width; the feed-forward block is 4 * d_model wide.
        block_size: longest sequence, in tokens.
        dropout: probability on embeddings, attention weights, the feed-forward activation and both residual branches.
        bias: whether linear layers and norms have biases.
        init: how matrices start, see `initialize`.
        layers: "fastattn" or "torch", who supplies the layers.

    Raises:
        ValueError: sizes that do not fit together, or an unknown `layers`.
    """

    def __init__(
        self,
        vocab_size,
        *,
        n_layer,
        n_head,
        d_model,
        block_size,
        dropout=0.0,
        bias=True,
        init="gpt2",
        layers="fastattn",
    ):
        super().__init__()
        if d_model % n_head:
            raise ValueError(f"d_model: expected a multiple of n_head, got d_model {d_model} and n_head {n_head}")
        encoder_layer, norm, self.loss = layer_classes(layers)
        self.block_size, self.layers = block_size, layers
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(block_size, d_model)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            encoder_layer(
                d_model, n_head, 4 * d_model, dropout, activation="gelu", batch_first=True, norm_first=True, bias=bias
            )
            for _ in range(n_layer)
        )
        self.norm = norm(d_model, bias=bias)
        mask = None  # torch.nn wants a mask beside is_causal=True, True = ignore; fastattn.nn does without
        if layers == "torch":
            mask = torch.ones(block_size, block_size, dtype=torch.bool).triu(1)
        self.register_buffer("causal_mask", mask, persistent=False)
        initialize(self, init, n_layer)

    def num_parameters(self):
        """Number of parameters without the position table, as the field counts them."""
        return sum(p.numel() for p in self.parameters()) - self.position_embedding.weight.numel()

    def forward(self, tokens, targets=None, cache=None):
        """Logits of the next token, or the mean loss when the next tokens are given.

        Args:
            tokens: (batch, seqlen) int64, seqlen at most block_size.
            targets: None or (batch, seqlen) int64, the token that follows each of `tokens`.
            cache: None or a KeyValueCache, for evaluation without gradients: `tokens` follow those it has seen, and are
                added to it.

        Returns:
            Logits (batch, seqlen, vocab_size); with targets their mean cross-entropy in nats a token, fp32.

        Raises:
            ValueError: more than block_size tokens, those in the cache included.
        """
        seqlen, start = tokens.shape[1], 0 if cache is None else cache.length
        if start + seqlen > self.block_size:
            raise ValueError(f"tokens: expected at most block_size = {self.block_size} in a row, got {start + seqlen}")
        x = self.token_embedding(tokens) + self.position_embedding.weight[start : start + seqlen]
        x = self.dropout(x)
        if cache is not None:
            x = cache.run_blocks(self.blocks, x, use_torch=self.layers == "torch")
        else:
            mask = None if self.causal_mask is None else self.causal_mask[:seqlen, :seqlen]
            for block in self.blocks:
                x = block(x, src_mask=mask, is_causal=True)
        x, head = self.norm(x), self.token_embedding.weight  # the head is the embedding: tied without a copy
        return F.linear(x, head) if targets is None else self.loss(x, head, targets)
