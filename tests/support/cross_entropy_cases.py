"""Arguments of linear_cross_entropy and the composition of PyTorch that a user would write."""

import torch
import torch.nn.functional as F


def arguments(tokens, d_model, vocab, dtype=torch.float32, biased=False, device="cpu", seed=0, scale=2.0):
    """x, weight, bias (leaves that require grad) and target, in which every fifth token is ignored (-100)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (tokens,) if isinstance(tokens, int) else tokens

    def leaf(*size, scale=1.0):
        return (torch.randn(size, generator=generator) * scale).to(device, dtype).requires_grad_()

    x, weight = leaf(*shape, d_model), leaf(vocab, d_model, scale=scale * d_model**-0.5)
    target = torch.randint(vocab, shape, generator=generator)
    target.view(-1)[::5] = -100
    return x, weight, leaf(vocab) if biased else None, target.to(device)


def plain(x, weight, bias, target, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0, reduction="mean"):
    """As a user would write it: products in the dtype of x, the rest in fp32 or fp64."""
    logits = F.linear(x, weight, bias).flatten(0, -2)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    target = target.flatten().long()
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    loss = F.cross_entropy(logits, target, reduction=reduction, **options)
    if z_loss:
        kept = target != ignore_index
        square = torch.where(kept, logits.logsumexp(-1).square(), 0.0)
        if reduction != "none":
            square = square.sum() / (kept.sum() if reduction == "mean" else 1)
        loss = loss + z_loss * square
    return loss


def gradients(loss, inputs, dloss):
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    return torch.autograd.grad(loss, wanted, dloss)
