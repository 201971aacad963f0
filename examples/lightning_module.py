"""A LightningModule whose model was replaced: nothing else in the script changes. Needs the package lightning."""

import copy
import logging
import time
import warnings

import lightning
import torch
import torch.nn.functional as F
from comparison import check_agreement, read_options
from torch import nn

import fastattn


class Classifier(lightning.LightningModule):
    """A transformer encoder of torch.nn over rows of tokens, and a linear layer on the mean."""

    def __init__(self, vocab, width, layers, p):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, p, activation="gelu", batch_first=True)
        self.tokens, self.encoder = nn.Embedding(vocab, width), nn.TransformerEncoder(layer, layers)
        self.head, self.losses = nn.Linear(width, 2), []

    def loss(self, tokens, labels):
        return F.cross_entropy(self.head(self.encoder(self.tokens(tokens)).mean(1)), labels)

    def training_step(self, batch, index):
        loss = self.loss(*batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(model, loader, steps):
    """Seconds of a run with Lightning's Trainer."""
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="auto", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit(model, loader)
    return time.perf_counter() - start


def main(arguments=None):
    """Train a classifier twice, the second time after one line."""
    options = read_options(__doc__, arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    vocab, width, layers, seqlen = (50, 32, 1, 12) if options.tiny else (1000, 256, 3, 128)
    torch.manual_seed(0)
    model = Classifier(vocab, width, layers, p=0.0)
    tokens = torch.randint(0, vocab, (4 * options.steps, seqlen))
    data = torch.utils.data.TensorDataset(tokens, tokens[:, 0] % 2)
    ours = copy.deepcopy(model)
    print(fastattn.replace(ours))  # the one line
    check_agreement(model, ours, lambda model: model.loss(*data[:4]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about the number of workers
        seconds, our_seconds = (
            train(each, torch.utils.data.DataLoader(data, 4), options.steps) for each in (model, ours)
        )
    print(f"losses before:        {' '.join(f'{loss:.4f}' for loss in model.losses)}")
    print(f"losses with fastattn: {' '.join(f'{loss:.4f}' for loss in ours.losses)}")
    print(f"{seconds:.2f} s before, {our_seconds:.2f} s with fastattn: {seconds / our_seconds:.2f} times as fast")
    torch.testing.assert_close(ours.losses, model.losses, rtol=1e-3, atol=1e-4)
    return seconds / our_seconds


if __name__ == "__main__":
    main()
