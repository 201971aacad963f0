"""Text from a trained model, one token after the other."""

import torch

from .config import UsageError


def check_sampling(max_new_tokens, temperature, top_k):
    """Raises UsageError for values that cannot be sampled with."""
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"temperature: expected 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k: expected at least 1, got {top_k}")


@torch.no_grad()
def generate_tokens(model, prompt, max_new_tokens, *, temperature=0.8, top_k=None, seed=0):
    """Continue a prompt.

    Args:
        model: a CausalLM; left in the mode (training or evaluation) it was in.
        prompt: list of int, at least one token; the model sees the last block_size of everything so far.
        max_new_tokens: tokens to add.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: None or how many of the most likely tokens may be drawn.
        seed: the same seed gives the same text.

    Returns:
        list of int: the new tokens.

    Raises:
        UsageError: an empty prompt or values out of range.
    """
    check_sampling(max_new_tokens, temperature, top_k)
    if not prompt:
        raise UsageError("prompt: expected at least one token, got an empty text")
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.tensor([prompt], device=device)
    for _ in range(max_new_tokens):
        logits = model(tokens[:, -model.block_size :])[:, -1].float()
        if temperature == 0:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            if top_k is not None and top_k < logits.shape[-1]:
                lowest = logits.topk(top_k).values[:, -1:]
                logits = logits.masked_fill(logits < lowest, -torch.inf)
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, chosen], 1)
    model.train(was_training)
    return tokens[0, len(prompt) :].tolist()
