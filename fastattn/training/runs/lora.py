"""Selects the trainable weights of a model: all, its head, or its head and low-rank updates of the others (LoRA)."""

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..messages import UsageError

HEADS = ("head.", "pooler.")  # the modules after the hidden states


class LowRank(nn.Module):
    """weight + lora_b @ lora_a: (rows, columns); only the two factors are trained, and the update starts at 0.

    Source: Hu et al. 2021, "LoRA: low-rank adaptation of large language models", with alpha = rank.
    """

    def __init__(self, rows, columns, rank):
        super().__init__()
        self.lora_a = nn.Parameter(torch.empty(rank, columns))
        self.lora_b = nn.Parameter(torch.zeros(rows, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)

    def forward(self, weight):
        return torch.addmm(weight, self.lora_b, self.lora_a)


def train_only(model, what, rank):
    """Make all weights trainable ("all"), only the head ("head"), or the head and low-rank updates ("lora").

    Raises:
        UsageError: the model has no such weights.
    """
    if what == "all":
        return
    if what == "lora" and not add_lora(model, rank):
        raise UsageError("trained 'lora' needs a transformer, got a model without blocks")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(HEADS) or ".lora_" in name)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("trained 'head' needs a head with its own weights; set --model.tied false")


def add_lora(model, rank):
    """Add a LowRank of `rank` to every matrix of the blocks, but not to embeddings, norms and heads.

    Returns:
        The number of matrices.
    """
    matrices = [
        (module, name)
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if "blocks." in f"{path}." and parameter.dim() == 2
    ]
    for module, name in matrices:
        rows, columns = getattr(module, name).shape
        parametrize.register_parametrization(module, name, LowRank(rows, columns, min(rank, rows, columns)))
    return len(matrices)


def merge_lora(model):
    """Replace the weights by their sums with the updates, so that the model is plain again."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
