"""The devices of a run."""

import os

import torch

from ..messages import UsageError

# Environment variables through which a launcher tells a process its number and the numbers of processes.
_OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_PORT")


def pick_device(accelerator):
    """The torch.device for "auto", "cpu" or "cuda"; UsageError if there is no such GPU."""
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise UsageError("accelerator 'cuda' needs a CUDA GPU, but PyTorch finds none on this machine")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def check_devices(config):
    """Raise UsageError for devices or number formats that this machine lacks, or wrong variables of a launcher."""
    device = pick_device(config.accelerator)
    if device.type == "cuda" and config.devices > torch.cuda.device_count():
        raise UsageError(f"devices must be at most {torch.cuda.device_count()} on this machine, got {config.devices}")
    if device.type == "cpu" and config.precision == "16-mixed":
        raise UsageError("precision must be 32-true, bf16-mixed or bf16-true on a CPU, got '16-mixed'")
    several = config.devices * config.num_nodes > 1
    if several and config.strategy == "auto":
        raise UsageError(
            f"strategy must be 'ddp' or 'fsdp' for {config.devices} x {config.num_nodes} devices, got 'auto'"
        )
    if several or "TORCHELASTIC_RUN_ID" in os.environ:
        for name in _OF_LAUNCHERS:
            value = os.environ.get(name, "0")
            if not value.isdecimal():
                raise UsageError(f"the environment variable {name} must be a whole number, got {value!r}")
    # The process group would wait for ever.
    if several and "LOCAL_RANK" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UsageError("the environment variable LOCAL_RANK is set, but WORLD_SIZE is not: unset it, or use torchrun")
    started = int(os.environ.get("WORLD_SIZE", 1)) if "TORCHELASTIC_RUN_ID" in os.environ else None
    if started not in (None, config.devices * config.num_nodes):
        raise UsageError(
            f"devices * num_nodes must be {started}, the number of processes that torchrun started, "
            f"got {config.devices} * {config.num_nodes}"
        )
