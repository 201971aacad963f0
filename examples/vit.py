"""Trains a small vision transformer of transformers on random images, before and after `fastattn.replace`."""

import torch
import transformers
from comparison import compare, read_options


def main(arguments=None):
    """Train both copies to tell ten classes apart."""
    options = read_options(__doc__, arguments)
    width, layers, size, rows = (32, 1, 32, 2) if options.tiny else (192, 6, 224, 4)
    config = transformers.ViTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=4 * width,
        image_size=size, patch_size=16, num_labels=10,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).train()
    images, labels = torch.randn(rows, 3, size, size), torch.arange(rows) % 10
    return compare(model, lambda model: model(pixel_values=images, labels=labels).loss, options.steps)


if __name__ == "__main__":
    main()
