"""The loss of a model on a whole split, and the report of a run."""

import math
import time
from contextlib import nullcontext

import torch

from .checkpoint import check_run, choose_checkpoint, read_summary
from .config import UsageError
from .data import TextData, to_tokens, window_batches
from .text import read_text
from .tokenizer import load_tokenizer


@torch.no_grad()
def summed_loss(model, tokens, block_size, *, limit=None, rank=0, world_size=1, autocast=nullcontext):
    """Cross-entropy over the consecutive windows of a split, dropout off.

    Args:
        model: a CausalLM; left in the mode it was in.
        tokens: (n,) int32.
        block_size: tokens in a window.
        limit: None or the number of windows to read.
        rank, world_size: which part of the windows is this process's.
        autocast: gives the context to run the model in.

    Returns:
        (sum of the losses in nats, number of predicted tokens).
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for inputs, targets in window_batches(tokens, block_size, limit, rank, world_size):
        with autocast():
            loss = model(inputs.to(device), targets.to(device))
        total += loss.double().item() * targets.numel()
        count += targets.numel()
    model.train(was_training)
    return total, count


def pick_device(accelerator):
    """The torch.device for "auto", "cpu" or "cuda"; UsageError if there is no such GPU."""
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise UsageError("accelerator: expected a CUDA GPU for 'cuda', got a machine without one that PyTorch can use")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def load_run(run, config, *, checkpoint="best", accelerator="auto", layers=None):
    """A trained model and its tokenizer.

    Args:
        run: folder of the run.
        config: its TrainConfig.
        checkpoint: "best", "last" or a step.
        accelerator: "auto", "cpu" or "cuda".
        layers: None or other layers than the model was trained with.

    Returns:
        (model in evaluation mode, tokenizer, step).

    Raises:
        UsageError: no such run or device, no undamaged checkpoint.
    """
    check_run(run)
    device = pick_device(accelerator)
    tokenizer = load_tokenizer(run / "tokenizer.json")
    chosen = choose_checkpoint(run, checkpoint)
    if chosen is None:
        raise UsageError(f"run {str(run)!r}: expected a checkpoint, got none yet; continue it with --resume {run}")
    model = build_model(config, tokenizer, layers)
    load_weights(model, chosen[0])
    return model.to(device).eval(), tokenizer, chosen[1]["step"]


def build_model(config, tokenizer, layers=None):
    """The CausalLM that a TrainConfig describes, on the CPU."""
    from fastattn.models import CausalLM

    return CausalLM(tokenizer.vocab_size, layers=layers or config.layers, **vars(config.model))


def load_weights(model, folder):
    """Fill a model from a checkpoint folder; UsageError if the weights are those of another shape."""
    from safetensors.torch import load_model

    try:
        load_model(model, str(folder / "model.safetensors"), strict=True)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise UsageError(f"{folder}: expected weights of the model in config.yaml, got {text[:200]}") from None


def evaluate_run(run, config, *, split=None, data=None, checkpoint="best", accelerator="auto", layers=None):
    """The whole split in consecutive non-overlapping windows of block_size tokens.

    Args:
        run, config, checkpoint, accelerator, layers: as for load_run.
        split: "train", "validation", "test"; None is "test" where the run has one, else "validation".
        data: None for the run's own text, or another source, read whole.

    Returns:
        dict: loss in nats a token, perplexity, bits_per_character, and what they were measured on.

    Raises:
        UsageError: as load_run; a split the run does not have; a text that is too short or has unknown characters.
    """
    model, tokenizer, step = load_run(run, config, checkpoint=checkpoint, accelerator=accelerator, layers=layers)
    if data is not None:
        if split is not None:
            raise UsageError(f"split: expected none beside --data, which is read whole, got {split!r}")
        split, source, tokens = "all", data, to_tokens(tokenizer, read_text(data))
    else:
        source = config.data.source
        splits = TextData(config.data, tokenizer, read_summary(run)).splits
        split = split or ("test" if "test" in splits else "validation")
        if split not in splits:
            raise UsageError(f"split: expected one of {', '.join(splits)} of this run, got {split!r}")
        tokens = splits[split]
    block_size = config.model.block_size
    if len(tokens) <= block_size:
        raise UsageError(f"text {source!r}: expected more than block_size = {block_size} tokens, got {len(tokens)}")
    start = time.perf_counter()
    total, count = summed_loss(model, tokens, block_size)
    seconds = time.perf_counter() - start
    characters = len(tokenizer.decode(tokens[1 : count + 1].tolist()))
    return {
        "run": str(run),
        "step": step,
        "source": source,
        "split": split,
        "tokens": count,
        "characters": characters,
        "loss": total / count,
        "perplexity": math.exp(total / count),
        "bits_per_character": total / math.log(2) / characters,
        "tokens_per_second": count / seconds,
    }
