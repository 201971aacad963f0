"""Which weights of a model learn: all, its head, or its head and low-rank additions to the others (LoRA)."""

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..messages import UsageError

HEADS = ("head.", "pooler.")  # what stands behind the states of a model


class LowRank(nn.Module):
    """weight + lora_b @ lora_a: (rows, columns), of which only the two factors learn; at the start it is the weight.

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
    """Leave gradients to all weights ("all"), to the head ("head"), or to it and to low-rank additions ("lora").

    Raises:
        UsageError: a model without what is to learn.
    """
    if what == "all":
        return
    if what == "lora" and not add_lora(model, rank):
        raise UsageError("trained: expected a transformer for 'lora', got a model without blocks")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(HEADS) or ".lora_" in name)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(
            "trained: expected a head with weights of its own for 'head', got none; with --model.tied false it has some"
        )


def add_lora(model, rank):
    """Give every matrix of the blocks a LowRank of `rank`; embeddings, norms and heads stay plain.

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
    """Make the sums the weights, so that the model is the plain one again."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
