"""How much of a device's arithmetic a training run uses (model FLOPs utilization, MFU)."""

import time

import torch

from fastattn.models import MaskedLM
from fastattn.models.backbone import Head

from ..data.batches import MASKED

# dense bf16 and fp16 products of a device, FLOP/s, by the makers' data sheets; sparse figures are twice these
PEAKS = {"H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


def flops_per_token(model, shape):
    """Operations of a training step for each token.

    6 a weight of a matrix, 12 * d_model * block_size a layer of attention. Looking up an embedding costs nothing, an
    output layer counts also when it is tied to the embedding, that of a MaskedLM for the tokens it predicts. Half the
    tokens of a translator pass its encoder, half its decoder.

    Args:
        model: nn.Module.
        shape: ModelConfig.
    Source: Chowdhery et al. 2022, "PaLM: scaling language modeling with pathways", appendix B.
    """
    tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]

    def matrices(module):
        return sum(p.numel() for p in module.parameters() if p.dim() > 1 and all(p is not table for table in tables))

    weights, head = matrices(model), getattr(model, "head", None)
    if isinstance(head, Head):
        output = matrices(head) + (tables[0].numel() if head.weight is None else 0)
        weights += (MASKED * output if isinstance(model, MaskedLM) else output) - matrices(head)
    if hasattr(model, "decoder"):
        weights //= 2
    attention = shape.n_layer * shape.d_model * shape.block_size if shape.body == "transformer" else 0
    return 6 * weights + 12 * attention


def peak_flops(device, precision):
    """FLOP/s of matrix products: a GPU's by its data sheet, a CPU's measured (about 0.1 s); None for an unknown GPU.

    Args:
        device: torch.device.
        precision: of a TrainConfig; a CPU's products are measured in its number format.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = next((peak for part, peak in PEAKS.items() if part in name), None)
        return peak if precision != "32-true" else None
    n, best = 768, float("inf")
    a, b = torch.rand(2, n, n, dtype=torch.bfloat16 if precision.startswith("bf16") else torch.float32)
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best if best else None  # a clock that did not move tells nothing
