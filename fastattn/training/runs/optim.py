"""Optimizers and learning-rate schedules."""

import math

import torch


def learning_rate(step, steps, optim):
    """The learning rate of a step, counted from 0: a linear warm-up, then the schedule of an OptimConfig.

    constant stays at learning_rate; cosine and linear reach min_learning_rate at `steps`; noam falls with
    1 / sqrt(step) after the warm-up (Vaswani et al., "Attention is all you need", 2017, section 5.3); wsd stays at
    learning_rate and falls linearly to min_learning_rate in the last share of the steps (Hu et al., "MiniCPM", 2024).
    """
    high, low, warmup = optim.learning_rate, optim.min_learning_rate, optim.warmup_steps
    if step < warmup:
        return high * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if optim.schedule == "constant":
        return high
    if optim.schedule == "wsd":
        start = max(warmup, steps - round(optim.decay_fraction * steps))  # of the fall
        return high + max(0.0, min(1.0, (step - start) / max(1, steps - start))) * (low - high)
    if optim.schedule == "linear":
        return high + progress * (low - high)
    if optim.schedule == "noam":
        return max(low, high * math.sqrt((warmup + 1) / (step + 1)))
    return low + 0.5 * (1 + math.cos(math.pi * progress)) * (high - low)


class MuonWithAdamW(torch.optim.Optimizer):
    """torch.optim.Muon and torch.optim.AdamW as one optimizer; the groups say by "muon" who steps them.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; step sizes as in Liu et al.,
        "Muon is scalable for LLM training", 2025, so that one learning rate suits both.
    """

    def __init__(self, groups, optim, fused):
        rate, betas = optim.learning_rate, (optim.beta1, optim.beta2)
        muon, others = ([g for g in groups if g["muon"] is wanted] for wanted in (True, False))
        self._muon = torch.optim.Muon(muon, lr=rate, momentum=0.95, adjust_lr_fn="match_rms_adamw") if muon else None
        self._adamw = torch.optim.AdamW(others, lr=rate, betas=betas, fused=fused) if others else None
        parts = [part for part in (self._muon, self._adamw) if part is not None]
        super().__init__([group for part in parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure=None):
        """One step of both; closure: as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, wanted in ((self._muon, True), (self._adamw, False)):
            if part is not None:  # loading a state replaces the groups
                part.param_groups = [group for group in self.param_groups if group["muon"] is wanted]
                part.state = self.state
                part.step()
        return loss


def decay_cautiously(optimizer):
    """Make an optimizer take learning rate * decay * weight only from elements that its step does not move away from 0.

    The groups have the decay as "cautious_decay", and no other. Costs a copy of the weights that decay.

    Source: Chen et al., "Cautious weight decay", 2025.
    """
    before = {}

    @torch.no_grad()
    def keep(*_):
        decaying = (group for group in optimizer.param_groups if group["cautious_decay"])
        before.update({p: p.detach().clone() for group in decaying for p in group["params"] if p.grad is not None})

    @torch.no_grad()
    def decay(*_):
        for group in optimizer.param_groups:
            for p in group["params"]:
                if (old := before.pop(p, None)) is not None:
                    p.sub_(old * ((p - old) * old <= 0), alpha=group["lr"] * group["cautious_decay"])

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(decay)
    return optimizer


def build_optimizer(model, optim, fused):
    """The optimizer of an OptimConfig; each group has a "rate", the factor of its learning rate.

    Args:
        model: the model to train; parameters that need no gradient are left out.
        optim: OptimConfig.
        fused: use PyTorch's fused implementation.
    """
    groups = parameter_groups(model, optim)
    if optim.cautious_decay:
        for group in groups:
            group["cautious_decay"], group["weight_decay"] = group["weight_decay"], 0.0
        return decay_cautiously(_build(groups, optim, fused))
    return _build(groups, optim, fused)


def _build(groups, optim, fused):
    if optim.name == "muon":
        return MuonWithAdamW(groups, optim, fused)
    for group in groups:
        del group["muon"]
    if optim.name in ("adam", "adamw"):
        # adam adds the decay to the gradient, adamw takes it from the weights
        kind = torch.optim.AdamW if optim.name == "adamw" else torch.optim.Adam
        return kind(groups, lr=optim.learning_rate, betas=(optim.beta1, optim.beta2), fused=fused)
    momentum = 0.0 if optim.name == "sgd" else optim.momentum
    return torch.optim.SGD(
        groups, lr=optim.learning_rate, momentum=momentum, nesterov=optim.name == "nesterov", fused=fused
    )


def parameter_groups(model, optim):
    """The trained parameters in groups of equal learning rate and decay: [{"params", "weight_decay", "rate", "muon"}].

    Weight decay is on matrices, and on embeddings unless optim.decay_embeddings is false. Muon takes the matrices that
    are neither embeddings nor the output layer. A kind of weights is one group whatever the values, so that they may
    change when a run resumes.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    rates, decay = optim.rates, optim.weight_decay
    together = optim.name != "muon" and optim.decay_embeddings and len(set(vars(rates).values())) == 1
    kinds = {  # what decays, at which rate, whether Muon takes it
        "matrices": (decay, rates.matrices, optim.name == "muon"), "head": (decay, rates.head, False),
        "embeddings": (decay * optim.decay_embeddings, rates.embeddings, False), "vectors": (0.0, rates.vectors, False),
    }  # fmt: skip
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        kind = "embeddings" if id(p) in tables else "head" if name.startswith("head.") or p.dim() > 2 else "matrices"
        kind = "vectors" if p.dim() <= 1 else "matrices" if together else kind
        decay, rate, muon = kinds[kind]
        group = groups.setdefault(kind, {"params": [], "weight_decay": decay, "rate": rate, "muon": muon})
        group["params"].append(p)
    return [groups[kind] for kind in kinds if kind in groups]


def average_of(model, decay):
    """The exponential moving average of a model's weights (AveragedModel), or None for a decay of 0."""
    if not decay:
        return None
    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay))
