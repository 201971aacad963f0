"""Peak memory of the training step of a causal language model, before and after `fastattn.replace`, on the CPU.

python benchmarks/peak_memory.py [TOKENS [VOCABULARY [WIDTH]]]        the defaults are 4096, 128256 and 256

The figures are the bytes that PyTorch's allocator holds at the peak of a step, without weights and their gradients,
which exist before. The base is the activations: a step of the same model without its output layer. Each step runs in
this process.
"""

import copy
import os
import sys

import torch
import transformers

import fastattn

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "support"))
from allocated import allocated_peak


def model_of(vocab, width):
    """A model of Llama's shape with two layers."""
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=width, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=2 * width, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).train()


def peak_of(call, model):
    """The peak in MB of a step whose gradients exist already."""
    call(model).backward()

    def step():
        model.zero_grad(set_to_none=False)
        call(model).backward()
        return ()

    return allocated_peak(step) / 2**20


def main(tokens=4096, vocab=128256, width=256):
    """Print the peaks of the step without the output layer, with torch's loss, and with ours."""
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {tokens} tokens, vocabulary {vocab},")
    print(f"width {width}, 2 layers, fp32\n\n| step | peak, MB | beyond the base, MB |\n|---|---|---|")
    ids = torch.randint(3, vocab, (1, tokens))
    model = model_of(vocab, width)
    ours = copy.deepcopy(model)
    fastattn.replace(ours)
    loss = {"input_ids": ids, "labels": ids, "use_cache": False}
    base = peak_of(lambda model: model.model(ids, use_cache=False)[0].sum(), model)
    our_base = peak_of(lambda model: model.model(ids, use_cache=False)[0].sum(), ours)
    print(f"| base, sdpa | {base:.0f} | |\n| base, fastattn.replace | {our_base:.0f} | |")
    before = peak_of(lambda model: model(**loss).loss, model)
    print(f"| loss, sdpa | {before:.0f} | {before - base:.0f} |")
    after = peak_of(lambda model: model(**loss).loss, ours)
    print(f"| loss, fastattn.replace | {after:.0f} | {after - our_base:.0f} |")
    print(f"\nBeyond the base, fastattn holds {100 * (after - our_base) / (before - base):.1f} % of what torch holds.")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
