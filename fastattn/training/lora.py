"""Low-rank additions to weights that stay as they are (LoRA)."""

import torch
from torch import nn
from torch.nn.utils import parametrize


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
