"""Which backend serves a call: `choose`, the reasons behind it, and the ways to override it.

An op registers, per backend, a function that answers why it cannot take a call, or None. `choose` walks the backends of
the device in order; the order is data, set from recorded benchmarks. Argument > use_backend() > FASTATTN_BACKEND.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from fastattn.ops._types import Backend

_CONSTANT = "_dynamo_marked_constant"

BACKENDS = ("native", "triton", "reference")

# per device, the order in which backends are asked; the reference comes last and takes everything
_ORDER = {"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")}

# The recorded table of exceptions from that order: kernels that are built but that no benchmark has put into it. They
# run where they are named, and only there; a row goes once docs/gpu-verification.md names a device.
_ON_REQUEST = {
    ("attention", "native", "cuda"): "not yet run on hardware",
    ("attention_decode", "native", "cuda"): "not yet run on hardware",
}


class _Registration(NamedTuple):
    """What `register_backend` was told."""

    refuses: Callable
    raw: str
    refuses_device: Callable
    facts: Callable | None
    note: Callable

    def named(self, facts):
        """A tuple of facts as the NamedTuple that the functions of the op read."""
        return facts if self.facts is None else self.facts(*facts)


_registered = {}  # (op, backend) -> _Registration
_unavailable = {}  # (backend, device type) -> reason, or a function: index of a device -> its reason or None
_decisions = {}  # (op, facts, wanted) -> backend


def _checked(name, source):
    if name in (None, "", "auto"):
        return None
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)} or auto, got {name!r}")
    return name


_override = _checked(os.environ.get("FASTATTN_BACKEND"), "FASTATTN_BACKEND")


def device_name(device):
    """How facts name the device of a tensor, with its index: "cuda:1". Decisions differ between two GPUs."""
    return str(device)


setattr(device_name, _CONSTANT, True)  # as for _decide below


def _type_and_index(device):
    kind, _, index = device.partition(":")
    return kind, int(index) if index else None


def register_backend(op, backend, refuses, raw=None, *, facts=None, refuses_device=None, note=None):
    """Tell that `op` can run on `backend`.

    Args:
        refuses: facts -> why the backend cannot serve the call, or None.
        raw: the raw op that must have a kernel for the device, <op>_fwd by default.
        facts: the NamedTuple of the facts of this op; the first two are "cpu" or a `device_name`, and the dtype.
        refuses_device: name of a device -> why no call can be served there, or None.
        note: facts -> what `explain` adds for a call that the backend can serve, or None.
    """
    _registered[op, backend] = _Registration(
        refuses, raw or f"{op}_fwd", refuses_device or _nothing, facts, note or _nothing
    )
    _decisions.clear()


def _nothing(_):
    return None


def set_unavailable(backend, device, reason):
    """Record that a backend does not exist on a device type ("cpu", "cuda"), and why; None takes it back.

    Where devices of the type differ, `reason` is a function of the index of one: its reason or None, asked once each.
    """
    _unavailable[backend, device] = functools.cache(reason) if callable(reason) else reason
    _decisions.clear()


def _reasons(backend, device):
    """Why `backend` does not exist on a device; where only a type is named one reason for each of its devices."""
    kind, index = _type_and_index(device)
    reason = _unavailable.get((backend, kind), f"there is no {backend} backend for {kind} tensors")
    if not callable(reason):
        return [reason]
    return [reason(i) for i in ([index] if index is not None else range(torch.cuda.device_count()))]


def unavailable(backend, device):
    """Why `backend` does not exist on a device ("cuda:1"), or on none of a type ("cuda"); None where it does."""
    if backend == "reference":
        return None
    reasons = _reasons(backend, device)
    return None if None in reasons else reasons[0]


def registered_ops():
    """The names of all ops that a backend has registered."""
    return sorted({op for op, _ in _registered})


def missing(op, backend, device):
    """Why there is no kernel of `op` by `backend` for a device, or a type of them, or None."""
    reason = unavailable(backend, device)
    if reason is not None or backend == "reference":
        return reason
    registered = _registered.get((op, backend))
    kind, _ = _type_and_index(device)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if registered is None or not has_kernel(f"fastattn::{registered.raw}.{backend}", kind.upper()):
        return f"{op} has no {backend} kernel for {kind} tensors"
    return None


def refuses_device(op, backend, device):
    """Why no call of `op` can run on `backend` on a device, or None."""
    reason = missing(op, backend, device)
    if reason is not None or backend == "reference":
        return reason
    return _registered[op, backend].refuses_device(device)


def refusal(op, backend, facts):
    """Why `backend` cannot serve this call of `op`, or None."""
    reason = refuses_device(op, backend, facts[0])
    if reason is not None or backend == "reference":
        return reason
    registered = _registered[op, backend]
    return registered.refuses(registered.named(facts))


def order(device):
    """The backends of a device in the order in which they are asked."""
    return _ORDER.get(_type_and_index(device)[0], BACKENDS)


def on_request(op, backend, device):
    """Why `backend` serves `op` on a device only where it is named, or None."""
    return _ON_REQUEST.get((op, backend, _type_and_index(device)[0]))


class Question(str):
    """The name of a backend, or "", that asks which one would serve the call. `choose` answers instead of choosing."""

    __slots__ = ()


class Answer(BaseException):
    """The answer to a `Question`. It is no Exception, so that nothing on its way up takes it for a mistake."""


def _decide(op, facts, wanted):
    decision = _decisions.get((op, facts, wanted))
    if decision is None:
        if wanted is None:
            decision = next(
                b for b in order(facts[0]) if on_request(op, b, facts[0]) is None and refusal(op, b, facts) is None
            )
        else:
            reason = refusal(op, wanted, facts)
            if reason is not None:
                raise ValueError(f"{op}: backend {wanted!r} was asked for but cannot serve this call: {reason}")
            decision = wanted
        _decisions[op, facts, wanted] = decision
    return decision


def _decide_named(op, facts, backend):
    if type(backend) is Question:
        raise Answer(explanation(op, facts, backend))
    return _decide(op, facts, asked_for(backend))


# torch.compile evaluates them while tracing: facts are constants there. What torch.compiler.assume_constant_result
# sets, without the import of the compiler that comes with it.
for _function in (_decide, _decide_named):
    setattr(_function, _CONSTANT, True)


def asked_for(backend=None, source="backend"):
    """The backend that the argument, use_backend() or FASTATTN_BACKEND name, or None.

    Args:
        source: what messages call the argument.
    """
    return _checked(backend, source) if backend else _override


def choose(op, facts, backend=None):
    """The backend that serves a call of `op`.

    Ops choose before they draw random numbers, move data or write anything: `explain` ends there.

    Args:
        facts: the facts of the op, hashable, as `register_backend` says.
        backend: a name, or None for use_backend(), FASTATTN_BACKEND or the automatic choice.
    Raises:
        ValueError: the name is unknown, or that backend cannot serve the call; the message has the reason.
        Answer: `backend` is a Question.
    """
    if backend is None:
        return _decide(op, tuple(facts), _override)
    return _decide_named(op, tuple(facts), backend)


@contextlib.contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Within the block every op runs on backend `name`: "native", "triton", "reference" or "auto", the usual choice.

    An op that the backend cannot serve raises ValueError with the reason. Holds for all threads of the process.
    """
    global _override
    before, _override = _override, _checked(name, "backend")
    try:
        yield
    finally:
        _override = before


def explanation(op, facts, backend=None):
    """The text of `fastattn.explain` for one call."""
    wanted = asked_for(backend)
    reasons = {name: refusal(op, name, facts) for name in order(facts[0])}
    try:
        runs = _decide(op, tuple(facts), wanted)
    except ValueError:
        runs = None
    lines = [
        f"{op} on {facts[0]}, {str(facts[1]).removeprefix('torch.')}" + (f", {wanted} asked for" if wanted else "")
    ]
    for name, reason in reasons.items():
        if name == runs:
            text = "runs"
        elif reason is not None:
            text = f"no: {reason}"
        elif wanted is None and on_request(op, name, facts[0]):
            text = f'{on_request(op, name, facts[0])}: name backend="{name}" to use it'
        else:
            text = "could, but comes later in the order" if wanted is None else "could, but was not asked for"
        lines.append(f"  {name}: {text}")
    for name, reason in reasons.items():
        registered = _registered.get((op, name))
        if reason is None and registered is not None:
            note = registered.note(registered.named(facts))
            lines += [f"  {note}"] if note else []
    return "\n".join(lines)


def backends() -> dict[str, dict[str, str]]:
    """Per device type, which backends are there: {"cpu": {"native": "available", "triton": "<why not>", ...}, ...}.

    Where one GPU is served and another is not the text names each: "cuda:0: available; cuda:1: <why not>".
    """
    return {device: {name: _state(name, device) for name in names} for device, names in _ORDER.items()}


def _state(backend, device):
    if backend == "reference":
        return "available"
    reasons = [reason or "available" for reason in _reasons(backend, device)]
    if len(set(reasons)) == 1:
        return reasons[0]
    return "; ".join(f"{device}:{index}: {reason}" for index, reason in enumerate(reasons))


def grad_wanted(*tensors):
    """Whether autograd must see this call."""
    if torch.is_grad_enabled():
        for t in tensors:  # any() on a generator takes twice as long, in every call of every op
            if t is not None and t.requires_grad:
                return True
    return False
