"""The speed of a training run, and its share of a device's peak arithmetic (model FLOPs utilization, MFU)."""

import time

import torch

from fastattn.models import MaskedLM
from fastattn.models.backbone import Head

from ..data.batches import MASKED
from .lora import HEADS

# peak FLOP/s of dense bf16 and fp16 products, from data sheets; sparse figures are twice these
PEAKS = {"H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


def flops_per_token(model, shape):
    """Operations of a training step per token.

    The forward pass costs 2 per matrix weight, and 4 * n_head * head_dim * (block_size, or a smaller window) per
    attention layer. The backward costs the same for trained weights, and the same again for the inputs unless only the
    head is trained. Embedding look-ups and the sums of LoRA are not counted. The output layer counts even if tied. In a
    MaskedLM only the masked tokens pass it. In a translator, half the tokens pass the encoder and half the decoder.

    Args:
        model: nn.Module; the weights that require a gradient are trained.
        shape: ModelConfig.
    Source: Chowdhery et al. 2022, "PaLM: scaling language modeling with pathways", appendix B.
    """
    tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    through = any(p.requires_grad for name, p in model.named_parameters() if not name.startswith(HEADS))

    def product(weight):
        return 2 * weight.numel() * (1 + through + weight.requires_grad)

    def products(module):
        matrices = (p for name, p in module.named_parameters() if p.dim() > 1 and ".lora_" not in name)
        return sum(product(p) for p in matrices if all(p is not table for table in tables))

    operations, head = products(model), getattr(model, "head", None)
    if isinstance(head, Head):
        output = products(head) + (product(tables[0]) if head.weight is None else 0)
        operations += (MASKED * output if isinstance(model, MaskedLM) else output) - products(head)
    if hasattr(model, "decoder"):
        operations //= 2
    attention = 0
    if shape.body == "transformer":
        width, pattern = shape.n_head * (shape.head_dim or shape.d_model // shape.n_head), shape.window_pattern
        for layer in range(shape.n_layer):
            windowed = shape.window is not None and pattern[layer % len(pattern)] == "S"
            attention += width * min(shape.block_size, shape.window if windowed else shape.block_size)
    return operations + 4 * (1 + 2 * through) * attention


def peak_flops(device, precision):
    """FLOP/s of matrix products, from the data sheet of a GPU; None if unknown, as for every CPU and for fp32.

    The peak is not measured: on a busy machine, or with another library or number format, a measurement is no limit.

    Args:
        device: torch.device.
        precision: of a TrainConfig.
    """
    if device.type != "cuda" or precision == "32-true":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


class Speedometer:
    """Times the steps of a run; each `with` block is one step.

    Args:
        tokens_a_step: average number of tokens per step.
        flops_per_token: operations of one device per token of a step.
        device, precision: as for `peak_flops`.
    """

    def __init__(self, tokens_a_step, flops_per_token, device, precision):
        self.tokens_a_step, self.flops_per_token = tokens_a_step, flops_per_token
        self.peak = peak_flops(device, precision)
        self.seconds, self.steps = 0.0, 0

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, *_):
        self.seconds += time.perf_counter() - self.start
        self.steps += 1

    def read(self):
        """{"tokens_per_second", "mfu", "seconds"} of the steps since the last reading; None if unknown."""
        speed = self.tokens_a_step * self.steps / self.seconds if self.seconds else None
        reading = {"tokens_per_second": speed, "mfu": self.utilization(speed), "seconds": self.seconds}
        self.seconds, self.steps = 0.0, 0
        return reading

    def utilization(self, tokens_per_second):
        """The model's FLOP/s divided by the device's peak (MFU); None if unknown."""
        if tokens_per_second is None or self.peak is None:
            return None
        share = tokens_per_second * self.flops_per_token / self.peak
        return share if share <= 1 else None  # otherwise, the device does not have the peak of its name
