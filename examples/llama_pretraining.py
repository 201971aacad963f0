"""A pretraining step of a model of Llama's shape, before and after `fastattn.replace`.

The loss is that of the model itself. After `replace` the logits of all tokens are never stored.
"""

import torch
import transformers
from comparison import compare, read_options


def main(arguments=None):
    """Train both copies on random tokens."""
    options = read_options(__doc__, arguments)
    width, layers, vocab, seqlen = (32, 1, 100, 16) if options.tiny else (256, 4, 16000, 256)
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=8 * width // 3 // 16 * 16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).train()
    tokens = torch.randint(3, vocab, (2, seqlen))
    return compare(model, lambda model: model(input_ids=tokens, labels=tokens).loss, options.steps)


if __name__ == "__main__":
    main()
