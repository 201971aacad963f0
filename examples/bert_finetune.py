"""Fine-tunes a BERT classifier of transformers on a padded batch, before and after `fastattn.replace`."""

import torch
import transformers
from comparison import compare, read_options


def main(arguments=None):
    """Train both copies on rows of which most have padding."""
    options = read_options(__doc__, arguments)
    width, layers, rows, seqlen = (32, 1, 4, 12) if options.tiny else (256, 4, 8, 128)
    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, num_labels=2,
        intermediate_size=4 * width,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).train()
    lengths = torch.linspace(seqlen / 4, seqlen, rows).long()
    batch = {
        "input_ids": torch.randint(3, 1000, (rows, seqlen)),
        "attention_mask": (torch.arange(seqlen) < lengths[:, None]).long(),
        "labels": torch.arange(rows) % 2,
    }
    return compare(model, lambda model: model(**batch).loss, options.steps)


if __name__ == "__main__":
    main()
