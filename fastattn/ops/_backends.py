"""The choice of a backend for a call (`choose`), its reasons, and the ways to override it.

For each backend, an op registers a function that returns why the backend cannot serve a call, or None. `choose` tries
the backends of the device in an order set from benchmarks. Precedence: argument, use_backend(), FASTATTN_BACKEND.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from fastattn.ops._libraries import native_note
from fastattn.ops._types import Backend

_CONSTANT = "_dynamo_marked_constant"

BACKENDS = ("native", "triton", "reference")

# per device, the order in which backends are tried; the reference comes last and serves every call
_ORDER = {"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")}

# Kernels that are built but not yet benchmarked. The automatic choice skips them; they run only when named. Delete a
# row once docs/gpu-verification.md lists a device for it.
_ON_REQUEST = {
    ("attention", "native", "cuda"): "not yet run on hardware",
    ("attention_decode", "native", "cuda"): "not yet run on hardware",
}


class _Registration(NamedTuple):
    """The arguments of `register_backend`."""

    why_not: Callable
    raw: str
    why_not_device: Callable
    facts: Callable | None
    note: Callable

    def named(self, facts):
        """The facts, a plain tuple, as the NamedTuple of the op."""
        return facts if self.facts is None else self.facts(*facts)


_registered = {}  # (op, backend) -> _Registration
_unavailable = {}  # (backend, device type) -> reason, or a function: device index -> reason or None
_decisions = {}  # (op, facts, wanted) -> backend


def _checked(name, source):
    if name in (None, "", "auto"):
        return None
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)} or auto, got {name!r}")
    return name


_override = _checked(os.environ.get("FASTATTN_BACKEND"), "FASTATTN_BACKEND")


def device_name(device):
    """The name of a device in facts, with its index ("cuda:1"), because two GPUs may get different decisions."""
    return str(device)


setattr(device_name, _CONSTANT, True)  # see _decide below


def _type_and_index(device):
    kind, _, index = device.partition(":")
    return kind, int(index) if index else None


def register_backend(op, backend, why_not, raw=None, *, facts=None, why_not_device=None, note=None):
    """Register `backend` as an implementation of `op`.

    Args:
        why_not: facts -> why the backend cannot serve the call, or None.
        raw: the raw op that must have a kernel for the device; default <op>_fwd.
        facts: the NamedTuple of the facts of this op. Its first two fields are "cpu" or a `device_name`, and the dtype.
        why_not_device: name of a device -> why the backend can serve no call there, or None.
        note: facts -> a line that `explain` adds if the backend can serve the call, or None.
    """
    _registered[op, backend] = _Registration(
        why_not, raw or f"{op}_fwd", why_not_device or _nothing, facts, note or _nothing
    )
    _decisions.clear()


def _nothing(_):
    return None


def set_unavailable(backend, device, reason):
    """Record why a backend is not available on a device type ("cpu", "cuda"); None makes it available again.

    If devices of the type differ, `reason` is a function: device index -> reason or None, called once per device.
    """
    _unavailable[backend, device] = functools.cache(reason) if callable(reason) else reason
    _decisions.clear()


def _reasons(backend, device):
    """Why `backend` is not available on a device, as a list; for a device type, one entry for each of its devices."""
    kind, index = _type_and_index(device)
    reason = _unavailable.get((backend, kind), f"there is no {backend} backend for {kind} tensors")
    if not callable(reason):
        return [reason]
    return [reason(i) for i in ([index] if index is not None else range(torch.cuda.device_count()))]


def why_not_available(backend, device):
    """Why `backend` is not available on a device ("cuda:1") or on any device of a type ("cuda"), or None."""
    if backend == "reference":
        return None
    reasons = _reasons(backend, device)
    return None if None in reasons else reasons[0]


def registered_ops():
    """The names of all ops with a registered backend."""
    return sorted({op for op, _ in _registered})


def why_not_implemented(op, backend, device):
    """Why `backend` has no kernel of `op` for a device or device type, or None."""
    reason = why_not_available(backend, device)
    if reason is not None or backend == "reference":
        return reason
    registered = _registered.get((op, backend))
    kind, _ = _type_and_index(device)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if registered is None or not has_kernel(f"fastattn::{registered.raw}.{backend}", kind.upper()):
        return f"{op} has no {backend} kernel for {kind} tensors"
    return None


def why_not_on_device(op, backend, device):
    """Why `backend` can serve no call of `op` on a device, or None."""
    reason = why_not_implemented(op, backend, device)
    if reason is not None or backend == "reference":
        return reason
    return _registered[op, backend].why_not_device(device)


def why_not(op, backend, facts):
    """Why `backend` cannot serve this call of `op`, or None."""
    reason = why_not_on_device(op, backend, facts[0])
    if reason is not None or backend == "reference":
        return reason
    registered = _registered[op, backend]
    return registered.why_not(registered.named(facts))


def order(device):
    """The backends of a device in the order in which they are tried."""
    return _ORDER.get(_type_and_index(device)[0], BACKENDS)


def on_request(op, backend, device):
    """Why `backend` serves `op` on a device only when named, or None."""
    return _ON_REQUEST.get((op, backend, _type_and_index(device)[0]))


class Question(str):
    """A backend name, or "", that makes `choose` raise an `Answer` with the explanation instead of choosing."""

    __slots__ = ()


class Answer(BaseException):
    """The answer to a `Question`. Not an Exception, so that no `except Exception` on the way catches it."""


def _decide(op, facts, wanted):
    decision = _decisions.get((op, facts, wanted))
    if decision is None:
        if wanted is None:
            decision = next(
                b for b in order(facts[0]) if on_request(op, b, facts[0]) is None and why_not(op, b, facts) is None
            )
        else:
            reason = why_not(op, wanted, facts)
            if reason is not None:
                raise ValueError(f"{op}: backend {wanted!r} was asked for but cannot serve this call: {reason}")
            decision = wanted
        _decisions[op, facts, wanted] = decision
    return decision


def _decide_named(op, facts, backend):
    if type(backend) is Question:
        raise Answer(explanation(op, facts, backend))
    return _decide(op, facts, asked_for(backend))


# torch.compile evaluates them while tracing, where facts are constants. assume_constant_result does the same, but it
# imports the compiler.
for _function in (_decide, _decide_named):
    setattr(_function, _CONSTANT, True)


def asked_for(backend=None, source="backend"):
    """The backend named by the argument, use_backend() or FASTATTN_BACKEND, or None.

    Args:
        source: the name of the argument in messages.
    """
    return _checked(backend, source) if backend else _override


def choose(op, facts, backend=None):
    """The backend that serves a call of `op`.

    Ops must call it before they draw random numbers, move data or write anything, because `explain` stops here.

    Args:
        facts: the facts of the call, hashable, as described at `register_backend`.
        backend: a name, or None for use_backend(), FASTATTN_BACKEND or the automatic choice.
    Raises:
        ValueError: the name is unknown, or that backend cannot serve the call. The message gives the reason.
        Answer: `backend` is a Question.
    """
    if backend is None:
        return _decide(op, tuple(facts), _override)
    return _decide_named(op, tuple(facts), backend)


@contextlib.contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Run every op in the block on backend `name`: "native", "triton", "reference" or "auto" (the automatic choice).

    A call that the backend cannot serve raises ValueError with the reason. Applies to all threads of the process.

    Example:
        >>> with fastattn.use_backend("reference"):
        ...     fastattn.rms_norm(torch.randn(4, 64)).shape
        torch.Size([4, 64])
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
    reasons = {name: why_not(op, name, facts) for name in order(facts[0])}
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
            text = "could run, but comes later in the order" if wanted is None else "could run, but was not asked for"
        lines.append(f"  {name}: {text}")
    for name, reason in reasons.items():
        registered = _registered.get((op, name))
        if reason is None and registered is not None:
            note = registered.note(registered.named(facts))
            lines += [f"  {note}"] if note else []
    built = native_note(_type_and_index(facts[0])[0]) if reasons.get("native", "") is None else None
    return "\n".join(lines + ([f"  {built}"] if built else []))


def backends() -> dict[str, dict[str, str]]:
    """The state of each backend per device type: {"cpu": {"native": "available", "triton": "<why not>", ...}, ...}.

    If GPUs differ, the text names each: "cuda:0: available; cuda:1: <why not>".

    Example:
        >>> fastattn.backends()["cpu"]["reference"]
        'available'
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
    """Whether autograd must record this call."""
    if torch.is_grad_enabled():
        for t in tensors:  # any() on a generator takes twice as long, in every call of every op
            if t is not None and t.requires_grad:
                return True
    return False
