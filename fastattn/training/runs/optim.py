"""Optimizers and learning-rate schedules."""

import math

import torch


def learning_rate(step, steps, optim):
    """The learning rate of a step, counted from 0: a linear warm-up, then the schedule of an OptimConfig.

    constant stays at learning_rate; cosine and linear reach min_learning_rate at `steps`; noam falls with
    1 / sqrt(step) after the warm-up (Vaswani et al., "Attention is all you need", 2017, section 5.3).
    """
    high, low, warmup = optim.learning_rate, optim.min_learning_rate, optim.warmup_steps
    if step < warmup:
        return high * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if optim.schedule == "constant":
        return high
    if optim.schedule == "linear":
        return high + progress * (low - high)
    if optim.schedule == "noam":
        return max(low, high * math.sqrt((warmup + 1) / (step + 1)))
    return low + 0.5 * (1 + math.cos(math.pi * progress)) * (high - low)


def build_optimizer(model, optim, fused):
    """The optimizer of an OptimConfig, with weight decay on matrices (and embeddings) only.

    Args:
        model: the model to train; parameters that need no gradient are left out.
        optim: OptimConfig.
        fused: use PyTorch's fused implementation.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if optim.name in ("adam", "adamw"):
        # adam adds the decay to the gradient, adamw takes it from the weights
        kind = torch.optim.AdamW if optim.name == "adamw" else torch.optim.Adam
        return kind(groups, lr=optim.learning_rate, betas=(optim.beta1, optim.beta2), fused=fused)
    momentum = 0.0 if optim.name == "sgd" else optim.momentum
    return torch.optim.SGD(
        groups, lr=optim.learning_rate, momentum=momentum, nesterov=optim.name == "nesterov", fused=fused
    )


def average_of(model, decay):
    """The exponential moving average of a model's weights (AveragedModel), or None for a decay of 0."""
    if not decay:
        return None
    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay))
