"""Trains torch.nn.Transformer to reverse sequences, before and after `fastattn.replace`."""

import torch
import torch.nn.functional as F
from comparison import compare, read_options
from torch import nn

PAD, START = 0, 1


class Reverser(nn.Module):
    """Encoder and decoder of torch.nn, with the embeddings and the output layer that it leaves to the user."""

    def __init__(self, vocab, width, layers, longest):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(longest, width)
        self.transformer = nn.Transformer(
            width, nhead=4, num_encoder_layers=layers, num_decoder_layers=layers, dim_feedforward=4 * width,
            batch_first=True, norm_first=True,
        )  # fmt: skip
        self.head = nn.Linear(width, vocab)

    def embed(self, tokens):
        return self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]

    def forward(self, source, target):
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        padding = source == PAD
        y = self.transformer(
            self.embed(source), self.embed(target), tgt_mask=causal, tgt_is_causal=True,
            src_key_padding_mask=padding, memory_key_padding_mask=padding,
        )  # fmt: skip
        return self.head(y)


def main(arguments=None):
    """Train both copies on sequences of several lengths."""
    options = read_options(__doc__, arguments)
    vocab, width, layers, rows, longest = (20, 32, 1, 3, 10) if options.tiny else (1000, 256, 3, 8, 100)
    torch.manual_seed(0)
    model = Reverser(vocab, width, layers, longest)
    source = torch.randint(2, vocab, (rows, longest))
    for row, length in zip(source, torch.linspace(longest / 2, longest, rows).long(), strict=True):
        row[length:] = PAD
    target = torch.stack([torch.cat([row[row != PAD].flip(0), row[row == PAD]]) for row in source])
    shifted = torch.cat([torch.full((rows, 1), START), target[:, :-1]], 1)

    def loss_of(model):
        logits = model(source, shifted)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD)

    return compare(model.train(), loss_of, options.steps)


if __name__ == "__main__":
    main()
