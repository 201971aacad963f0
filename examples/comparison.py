"""What the examples share: two copies of a model take the same training steps, and the times are compared."""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence

import torch

import fastattn


def read_options(description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line of an example: --tiny for a model that takes a moment, and the number of steps."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--tiny", action="store_true", help="a model that takes a moment, as in the tests")
    parser.add_argument("--steps", type=int, help="training steps of each copy (default 8, with --tiny 2)")
    options = parser.parse_args(arguments)
    options.steps = options.steps or (2 if options.tiny else 8)
    return options


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    """A copy in training mode with a dropout of 0, so that two copies must agree."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "dropout_p", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def check_agreement(model, ours, loss_of):
    """Compare the loss and all gradients of two models that share their weights; raise if they differ."""
    losses, gradients = [], []
    for each in (without_dropout(model), without_dropout(ours)):
        loss = loss_of(each)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None]))
    difference = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    print(f"loss {losses[0]:.6f}, with fastattn {losses[1]:.6f}; gradients differ by {difference:.1e} of their norm")
    if not (abs(losses[1] - losses[0]) < 1e-4 * abs(losses[0]) and difference < 1e-3):
        raise SystemExit("the two models do not agree")


def timed_steps(model, loss_of, steps):
    """A generator: each turn is one training step with AdamW, and gives (loss, seconds)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        start = time.perf_counter()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item(), time.perf_counter() - start


def compare(model: torch.nn.Module, loss_of: Callable[[torch.nn.Module], torch.Tensor], steps: int) -> float:
    """Replace a copy of the model, check that both agree, train both in turns, and print how long a step takes.

    Args:
        model: in training mode; it is trained too.
        loss_of: model → a scalar loss, of the same batch at each call.
        steps: training steps of each copy.
    Returns: the time of a step of the model divided by that of the replaced copy, by their medians.
    Raises:
        SystemExit: loss or gradients do not agree.
    """
    ours = copy.deepcopy(model)
    print(fastattn.replace(ours))
    check_agreement(model, ours, loss_of)
    turns = list(zip(timed_steps(model, loss_of, steps), timed_steps(ours, loss_of, steps), strict=True))
    for name, losses in zip(("before", "with fastattn"), zip(*turns, strict=True), strict=True):
        print(f"{name}: loss {losses[0][0]:.4f} → {losses[-1][0]:.4f} in {steps} steps")
    theirs, own = (statistics.median(seconds for _, seconds in pairs) for pairs in zip(*turns, strict=True))
    print(f"a step: {1000 * theirs:.1f} ms before, {1000 * own:.1f} ms with fastattn: {theirs / own:.2f} times as fast")
    return theirs / own
