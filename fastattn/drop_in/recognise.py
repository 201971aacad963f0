"""Checks whether a module computes what we expect, by running its code on small random inputs. Its name is not enough.

A twin of the module, with other random weights, runs its own forward and then ours: in training and in evaluation, in
fp32 with all gradients, on large numbers, under autocast, and in the dtypes that the module may meet. The module itself
is not called.
"""

import contextlib
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_HALF = torch.bfloat16
_LARGE = 1e6  # an input beyond the bounds to which a module may clamp
_FEW = 2**11  # numbers of an input that is repeated many times
_FP32_SLACK, _HALF_SLACK = 64, 4  # units in the last place of the largest value


@contextlib.contextmanager
def quiet(device: torch.device):
    """Give a check random numbers and modes of its own, and leave those of the caller unchanged."""
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        torch.manual_seed(0)
        yield


def randomise(module: torch.nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Give a twin new parameters of the same shapes: random, and none near 0 or 1."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                values = 0.4 * torch.randn(parameter.shape, device=parameter.device, dtype=torch.float32) + 0.7
                part._parameters[name] = torch.nn.Parameter(values.to(dtype))


def cast(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round the parameters of a twin to a dtype."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(parameter.detach().to(dtype))


def run(module: torch.nn.Module, *inputs: Tensor) -> Tensor | None:
    """What the module's own forward gives, without hooks; None if it fails, gives no tensor, or changes the module."""
    before = dict(vars(module))
    lengths = {name: len(value) for name, value in before.items() if isinstance(value, (list, dict, set))}
    try:
        out = type(module).forward(module, *inputs)
    except Exception:
        return None
    after = vars(module)
    if before.keys() != after.keys() or any(after[name] is not value for name, value in before.items()):
        return None
    if any(len(before[name]) != length for name, length in lengths.items()):
        return None
    return out if isinstance(out, Tensor) and out.is_floating_point() else None


def halves_of(module: torch.nn.Module) -> list[tuple[torch.dtype, torch.dtype]]:
    """(parameters, input): the half dtypes in which to check a module: bfloat16, and float16 if it has it."""
    dtypes = {_HALF} | {p.dtype for p in module.parameters() if p.dtype == torch.float16}
    return [(dtype, dtype) for dtype in dtypes]


def close(got: Tensor | None, expected: Tensor | None, dtype: torch.dtype = torch.float32, factor: float = 1) -> bool:
    """Whether two results are equal up to rounding to `dtype`, the narrowest in the computation."""
    if got is None or expected is None:
        return got is expected
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return False
    slack = factor * (_FP32_SLACK if dtype == torch.float32 else _HALF_SLACK) * torch.finfo(dtype).eps
    error = (got.double() - expected.double()).abs().max().item()  # a NaN fails the comparison
    return error <= slack * expected.abs().max().item()


def _other_inputs(x):
    """The numbers of an input in other shapes, more of them, and one that is NaN."""
    found = [x[0], x[0, 0], x[None]]
    if x.numel() <= _FEW:
        found += [x.repeat(9, *[1] * (x.dim() - 1)), x.repeat(1, 40, *[1] * (x.dim() - 2))]
    found.append(x.clone())
    found[-1].view(-1)[0] = math.nan
    return found


def _alike(got, expected, dtype):
    """`close`, also where a result is NaN; a module may refuse an input."""
    if got is None or expected is None:
        return expected is None
    if got.shape != expected.shape or not torch.equal(got.isnan(), expected.isnan()):
        return False
    return close(got.nan_to_num(0, math.inf, -math.inf), expected.nan_to_num(0, math.inf, -math.inf), dtype)


def _gradients(module, x):
    leaf = x.detach().requires_grad_()
    out = run(module, leaf)
    if out is None or not out.requires_grad:
        return None
    weights = torch.linspace(-1, 1, out.numel(), device=x.device).view(out.shape)
    leaves = [leaf, *module.parameters()]
    return torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)


def computes_the_same(
    twin: torch.nn.Module, become: Callable[[], None], x: Tensor, halves: Iterable[tuple[torch.dtype, torch.dtype]]
) -> bool:
    """Whether a twin in fp32 gives the same before and after `become()` changed it.

    Args:
        x: an input in fp32.
        halves: pairs of dtypes (parameters, input) with at least one half. The results are compared in them too,
            unless its own forward refuses them.
    """

    def results():
        found = []
        for training in (True, False):
            twin.train(training)
            found.append(run(twin, x))
        found += run(twin, _LARGE * x), _gradients(twin, x)
        with torch.no_grad():
            found.append(run(twin, x))
        with torch.autocast(x.device.type, _HALF):  # a module may switch it off
            found.append(run(twin, x))
        for weights, inputs in halves:
            cast(twin, weights)
            found.append(run(twin, x.to(inputs)))
        return found

    def others():
        with torch.no_grad():
            found = [(run(twin, t), torch.float32) for t in _other_inputs(x)]
        for weights, inputs in halves:
            cast(twin, weights)
            if torch.float16 not in (weights, inputs):
                found.append((run(twin, (_LARGE * x).to(inputs)), _HALF))
        return found

    kept = [dict(part._parameters) for part in twin.modules()]

    def restore():
        for part, parameters in zip(twin.modules(), kept, strict=True):
            part._parameters.update(parameters)

    expected = results()
    restore()
    more_expected = others()
    restore()
    if expected[0] is None or expected[3] is None or not expected[0].any():
        return False
    become()
    got = results()
    restore()
    more = others()
    return (
        all(close(a, b) for a, b in zip(got[:3], expected[:3], strict=True))
        and got[3] is not None
        and all(close(a, b, factor=4) for a, b in zip(got[3], expected[3], strict=True))
        and close(got[4], expected[4])
        and all(b is None or close(a, b, _HALF) for a, b in zip(got[5:], expected[5:], strict=True))
        and all(_alike(a, b, dtype) for (a, _), (b, dtype) in zip(more, more_expected, strict=True))
    )
