"""A GPT that is written out in one file, before and after `fastattn.replace`.

Nothing in the model knows fastattn. Its norm is a class of its own, its attention calls torch's function, and its
output layer shares its weight with the embedding: `replace` recognises all three.
"""

import torch
import torch.nn.functional as F
from comparison import compare, read_options
from torch import nn

TEXT = (
    "A kernel reads its inputs once and writes its outputs once. What lies between them stays in registers and in the"
    " caches. A chain of small operations writes each intermediate value to memory and reads it back, and for"
    " most layers that traffic, and not the arithmetic, is what takes the time. "
)


class Norm(nn.Module):
    """A LayerNorm that may do without a bias."""

    def __init__(self, width, bias):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift)


class SelfAttention(nn.Module):
    """Causal attention with one layer for queries, keys and values."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a feed-forward block, each with a norm before it and a residual around it."""

    def __init__(self, width, heads, p, bias):
        super().__init__()
        self.before_attention, self.attention = Norm(width, bias), SelfAttention(width, heads, p)
        self.before_mlp = Norm(width, bias)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(p))
        self.drop = nn.Dropout(p)

    def forward(self, x):
        x = x + self.drop(self.attention(self.before_attention(x)))
        return x + self.mlp(self.before_mlp(x))


class SmallGPT(nn.Module):
    """(batch, seqlen) tokens and targets → the mean loss."""

    def __init__(self, vocab, seqlen, width, layers, heads, p=0.1, bias=False):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(seqlen, width)
        self.blocks = nn.Sequential(*(Block(width, heads, p, bias) for _ in range(layers)))
        self.norm, self.head = Norm(width, bias), nn.Linear(width, vocab, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, tokens, targets):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def main(arguments=None):
    """Train both copies to write TEXT, one byte a token."""
    options = read_options(__doc__, arguments)
    width, layers, seqlen = (32, 1, 32) if options.tiny else (256, 4, 256)
    torch.manual_seed(0)
    model = SmallGPT(256, seqlen, width, layers, heads=4)
    data = torch.tensor(list((4 * TEXT).encode()))
    rows = torch.stack([data[start : start + seqlen + 1] for start in (0, 50, 100, 150)])
    return compare(model, lambda model: model(rows[:, :-1], rows[:, 1:]), options.steps)


if __name__ == "__main__":
    main()
