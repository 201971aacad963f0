"""Which backend serves a call: `choose`, the reasons behind it, and the ways to override it.

An op registers, per backend, a function that answers why it cannot take a call, or None. `choose` walks the backends of
the device in order; the order is data, set from recorded benchmarks. Argument > use_backend() > FASTATTN_BACKEND.
"""

import contextlib
import os

import torch

BACKENDS = ("native", "triton", "reference")

# per device, the order in which backends are asked; the reference comes last and takes everything
_ORDER = {"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")}

# The recorded table of exceptions from that order: kernels that are built but that no benchmark has put into it. They
# run where they are named, and only there; a row goes once docs/gpu-verification.md names a device.
_ON_REQUEST = {
    ("attention", "native", "cuda"): "not yet run on hardware",
    ("attention_decode", "native", "cuda"): "not yet run on hardware",
}

_registered = {}  # (op, backend) -> (facts -> reason or None, name of its raw op)
_unavailable = {}  # (backend, device type) -> reason
_decisions = {}  # (op, facts, wanted) -> backend


def _checked(name, source):
    if name in (None, "", "auto"):
        return None
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)} or auto, got {name!r}")
    return name


_override = _checked(os.environ.get("FASTATTN_BACKEND"), "FASTATTN_BACKEND")


def register_backend(op, backend, refuses, raw=None):
    """Tell that `op` can run on `backend`.

    Args:
        refuses: facts -> why the backend cannot serve the call, or None; facts begin with device type and dtype.
        raw: the raw op that must have a kernel for the device, <op>_fwd by default.
    """
    _registered[op, backend] = refuses, raw or f"{op}_fwd"
    _decisions.clear()


def set_unavailable(backend, device, reason):
    """Record that a backend does not exist on a device type ("cpu", "cuda"), and why; None takes it back."""
    _unavailable[backend, device] = reason
    _decisions.clear()


def unavailable(backend, device):
    """Why `backend` does not exist on a device type, or None."""
    if backend == "reference":
        return None
    return _unavailable.get((backend, device), f"there is no {backend} backend for {device} tensors")


def registered_ops():
    """The names of all ops that a backend has registered."""
    return sorted({op for op, _ in _registered})


def missing(op, backend, device):
    """Why no call of `op` can run on `backend` for tensors of a device type, or None."""
    reason = unavailable(backend, device)
    if reason is not None or backend == "reference":
        return reason
    _, raw = _registered.get((op, backend), (None, None))
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if raw is None or not has_kernel(f"fastattn::{raw}.{backend}", device.upper()):
        return f"{op} has no {backend} kernel for {device} tensors"
    return None


def refusal(op, backend, facts):
    """Why `backend` cannot serve this call of `op`, or None."""
    reason = missing(op, backend, facts[0])
    if reason is not None or backend == "reference":
        return reason
    refuses, _ = _registered[op, backend]
    return refuses(facts)


def _decide(op, facts, wanted):
    decision = _decisions.get((op, facts, wanted))
    if decision is None:
        if wanted is None:
            decision = next(
                b
                for b in _ORDER.get(facts[0], ("reference",))
                if b == "reference" or ((op, b, facts[0]) not in _ON_REQUEST and refusal(op, b, facts) is None)
            )
        else:
            reason = refusal(op, wanted, facts)
            if reason is not None:
                raise ValueError(f"{op}: backend {wanted!r} was asked for but cannot serve this call: {reason}")
            decision = wanted
        _decisions[op, facts, wanted] = decision
    return decision


# torch.compile evaluates it while tracing: facts are constants there. What torch.compiler.assume_constant_result sets,
# without the import of the compiler that comes with it.
_decide._dynamo_marked_constant = True


def asked_for(backend=None):
    """The backend that the argument, use_backend() or FASTATTN_BACKEND name, or None."""
    return _override if backend is None else _checked(backend, "backend")


def choose(op, facts, backend=None):
    """The backend that serves a call of `op`.

    Args:
        facts: hashable tuple (device type, dtype, ...) as the op's backends expect.
        backend: a name, or None for use_backend(), FASTATTN_BACKEND or the automatic choice.
    Raises:
        ValueError: the name is unknown, or that backend cannot serve the call; the message has the reason.
    """
    return _decide(op, facts, asked_for(backend))


@contextlib.contextmanager
def use_backend(name):
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
    order = _ORDER.get(facts[0], ("reference",))
    reasons = {name: refusal(op, name, facts) for name in order}
    try:
        runs = choose(op, facts, backend)
    except ValueError:
        runs = None
    lines = [
        f"{op} on {facts[0]}, {str(facts[1]).removeprefix('torch.')}" + (f", {wanted} asked for" if wanted else "")
    ]
    for name in order:
        if name == runs:
            text = "runs"
        elif reasons[name] is not None:
            text = f"no: {reasons[name]}"
        elif wanted is None and (op, name, facts[0]) in _ON_REQUEST:
            text = f'{_ON_REQUEST[op, name, facts[0]]}: name backend="{name}" to use it'
        else:
            text = "could, but comes later in the order" if wanted is None else "could, but was not asked for"
        lines.append(f"  {name}: {text}")
    return "\n".join(lines)


def backends():
    """Per device type, which backends are there: {"cpu": {"native": "available", "triton": "<why not>", ...}, ...}."""
    return {
        device: {
            name: _unavailable.get((name, device), "not built") or "available" for name in order if name != "reference"
        }
        | {"reference": "available"}
        for device, order in _ORDER.items()
    }


def grad_wanted(*tensors):
    """Whether autograd must see this call."""
    if torch.is_grad_enabled():
        for t in tensors:  # any() on a generator takes twice as long, in every call of every op
            if t is not None and t.requires_grad:
                return True
    return False
