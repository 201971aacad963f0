"""Which devices a run uses."""

import os

import torch

from ..messages import UsageError


def pick_device(accelerator):
    """The torch.device for "auto", "cpu" or "cuda"; UsageError if there is no such GPU."""
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise UsageError("accelerator: expected a CUDA GPU for 'cuda', got a machine without one that PyTorch can use")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def check_devices(config):
    """Raises UsageError for devices or number formats that this machine has not."""
    device = pick_device(config.accelerator)
    if device.type == "cuda" and config.devices > torch.cuda.device_count():
        raise UsageError(f"devices: expected at most {torch.cuda.device_count()} on this machine, got {config.devices}")
    if device.type == "cpu" and config.precision == "16-mixed":
        raise UsageError("precision: expected 32-true, bf16-mixed or bf16-true on a CPU, got '16-mixed'")
    if config.devices * config.num_nodes > 1 and config.strategy == "auto":
        raise UsageError(
            f"strategy: expected 'ddp' or 'fsdp' for {config.devices} x {config.num_nodes} devices, got 'auto'"
        )
    started = int(os.environ.get("WORLD_SIZE", 1)) if "TORCHELASTIC_RUN_ID" in os.environ else None
    if started not in (None, config.devices * config.num_nodes):
        raise UsageError(
            f"devices: expected devices * num_nodes = {started}, the processes that torchrun started, "
            f"got {config.devices} * {config.num_nodes}"
        )
