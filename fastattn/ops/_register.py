"""The only place that talks to torch.library.

Raw ops have a schema (in _schemas.py) and a fake, and no autograd: an autograd.Function in the op's file stands outside
of them, which is the cheapest way from Python. The overload name is the backend, the dispatch key the device.

A tracer records operators and no autograd.Function: what it recorded would have no gradients, or could not be saved. So
where one is at work (`observed`), the op under another name is called, fastattn::<name>_<backend>, which has gradients
of its own and is slower by them. Both run the same kernel.
"""

import functools
import os
import sys
import warnings

import torch
from torch._decomp import register_decomposition
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from fastattn.ops._backends import grad_wanted
from fastattn.ops._libraries import load_library
from fastattn.ops._schemas import DEFINITIONS, NAMES

_BACKENDS = ("native", "triton")
_recorded = {backend: f"{backend}_recorded" for backend in _BACKENDS}
RECORDED = frozenset(_recorded.values())
"""The names of backends for ops as tracers record them."""

# every call of an op asks them
_is_compiling, _is_tracing = torch.compiler.is_compiling, torch._C._is_tracing
_transforms = torch._C._are_functorch_transforms_active


def _ask_fx():
    """The cheapest question whether torch.fx traces: from PyTorch 2.14 on its own one takes a microsecond."""
    of_thread = getattr(_symbolic_trace, "_is_fx_tracing_tls", None)
    if of_thread is None:
        return _symbolic_trace.is_fx_symbolic_tracing
    return lambda: of_thread.__dict__.get("flag", False)


_is_fx_tracing = _ask_fx()

# our checks read sizes while torch.jit.trace records; torch turns this off for its own code in the same way
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"fastattn\.")

_library = torch.library.Library("fastattn", "FRAGMENT")
_python_kernels = {}  # (name, backend, device type) -> function
_fakes = {}  # name -> function


def _define_all():
    load_library("libfastattn_schemas.so")
    for name, definition in DEFINITIONS.items():
        if not torch._C._dispatch_has_kernel(f"fastattn::{name}"):  # whatever its name says: it has a schema
            _library.define(definition)


_define_all()


def register_fake(name, fake):
    """Say what the results of a raw op look like, whatever its backend.

    Args:
        fake: the arguments of `name` on fake tensors -> results of the right shape, dtype and strides.
    """

    @functools.wraps(fake)
    def watched(*args, **kwargs):
        _excuse_from_lowering(name)
        return fake(*args, **kwargs)

    _fakes[name] = watched
    for full in NAMES[name]:
        torch.library.register_fake(f"fastattn::{full}", watched, lib=_library)


def _operator(full):
    name, _, overload = full.partition(".")
    return getattr(getattr(torch.ops.fastattn, name), overload or "default")


class RawOps(dict):
    """{backend: raw op}, and as `direct` the same without the call of an OpOverload, a function in Python.

    It takes 0.2 us. torch.compile needs it: `(ops if is_dynamo_compiling() else ops.direct)[backend](...)`.
    """

    def __init__(self, ops):
        super().__init__(ops)
        self.direct = {backend: op._op for backend, op in ops.items()}


def raw_ops(name):
    """The raw op of each backend, and for each of RECORDED the one that tracers record.

    For an op that tracers do not record, such as a backward, that is the raw op itself.
    """
    ops = {}
    for backend in _BACKENDS:
        if f"{name}.{backend}" in NAMES[name]:
            ops[backend] = ops[_recorded[backend]] = _operator(f"{name}.{backend}")
        if f"{name}_{backend}" in NAMES[name]:
            ops[_recorded[backend]] = _operator(f"{name}_{backend}")
    return RawOps(ops)


def register_reference(name, function):
    """Say what a raw op computes in plain PyTorch, for those who cannot run it: the ONNX exporter, or torch.func.

    Args:
        function: the arguments of `name` -> its results.
    """

    def decomposition(*args, **kwargs):
        # a FakeTensorMode looks into the same table, but only to learn what the results look like
        return (_fakes[name] if get_proxy_mode() is None else function)(*args, **kwargs)

    for full in NAMES[name]:
        register_decomposition(_operator(full), unsafe=True)(decomposition)


def _excuse_from_lowering(name):
    """Let inductor call an op that has a decomposition. With CI in the environment it takes that for an oversight."""
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is not None and os.environ.get("CI"):
        lowering.FALLBACK_ALLOW_LIST.add(f"fastattn::{name}")


def register_autograd(name, apply, reference):
    """Give the op under the names that tracers record gradients, and register its reference.

    Args:
        apply: (one of RECORDED, the arguments of `name`) -> its results, by the autograd.Function of the op.
        reference: as in `register_reference`.
    """
    register_reference(name, reference)
    for backend in ("native", "triton"):
        _library.impl(
            f"{name}_{backend}", _autograd_kernel(name, backend, apply, reference), "Autograd", with_keyset=True
        )


def _autograd_kernel(name, backend, apply, reference):
    op = _operator(f"{name}_{backend}")

    def kernel(keyset, *args):
        if needs_reference():
            return reference(*args)
        tensors = (arg for arg in args if isinstance(arg, torch.Tensor))
        if grad_wanted(*tensors) and not _is_tracing():  # that would record the autograd.Function as well
            return apply(_recorded[backend], *args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return kernel


def implement(name, backend, device, function):
    """Register a Python function as the kernel of `fastattn::<name>.<backend>` for device "CPU" or "CUDA"."""
    _library.impl(f"{name}.{backend}", function, device)
    if f"{name}_{backend}" in DEFINITIONS:
        _library.impl(f"{name}_{backend}", function, device)
    _python_kernels[name, backend, device.lower()] = function


def python_kernel(name, backend, *tensors):
    """What `fastattn::<name>.<backend>` would end in for tensors, where it may be called without the dispatcher.

    Passing twenty arguments to a kernel in Python through the dispatcher takes longer than preparing a launch. None
    where there is no such kernel, or where somebody looks on: a compiler, a dispatch mode, a subclass of Tensor.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return None
    for t in tensors:
        if type(t) is not torch.Tensor and type(t) is not torch.nn.Parameter:
            return None
    return _python_kernels.get((name, backend, "cpu" if tensors[0].is_cpu else tensors[0].device.type))


def needs_reference():
    """A functorch transform or forward-mode AD is active: raw ops would lose tangents without an error."""
    return _transforms() or forward_ad._current_level >= 0


def observed(runs):
    """The backend that serves a call, where somebody may look on.

    Args:
        runs: the backend by `choose`.
    Returns: one of RECORDED where a tracer records the call: torch.jit.trace, or in grad mode torch.export or make_fx,
        but not torch.compile. Without gradients torch.export and make_fx get the raw ops, which leave out what only a
        backward needs. "reference" where raw ops are unknown, as in `needs_reference`. Else `runs`.
    """
    if runs == "reference" or _transforms() or forward_ad._current_level >= 0:
        return "reference"
    if _is_compiling():
        is_traced = torch.compiler.is_exporting() and torch.is_grad_enabled()
    elif _is_tracing():
        if torch.onnx.is_in_onnx_export():
            return "reference"
        is_traced = True
    else:
        is_traced = _is_fx_tracing() and torch.is_grad_enabled() and get_proxy_mode() is not None
    return _recorded[runs] if is_traced else runs


def is_recorded(tensor):
    """This call is recorded for later ones: by torch.jit.trace, torch.fx, a FakeTensorMode or in a CUDA graph.

    What tensors hold now, or are, is then not what they hold when the record runs. A compiler is not meant.
    """
    if torch.compiler.is_compiling():  # it traces no question below
        return False
    return (
        torch._C._is_tracing()
        or _is_fx_tracing()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def apply(function, *args):
    """`function.apply(*args)` of an autograd.Function, compiled as well where one tensor stands in several places.

    torch.compile traces no function that gets a tensor twice. There every other place gets a view of it.
    """
    return function.apply(*(_distinct(args) if _is_compiling() else args))


def _distinct(args):
    found = []
    for arg in args:
        repeated = isinstance(arg, torch.Tensor) and any(arg is other for other in found)
        found.append(arg.view_as(arg) if repeated else arg)
    return found


def differentiate(function, inputs, grad_outputs):
    """Gradients by way of the reference, with a graph of their own: for backward(create_graph=True).

    Args:
        function: the reference as a function of `inputs` that returns a tuple of outputs.
        inputs: tensors or None.
        grad_outputs: one gradient or None per output.
    Returns: one gradient or None per input.
    """
    wanted = [i for i, t in enumerate(inputs) if t is not None and t.requires_grad]

    def of_wanted(*tensors):
        arguments = list(inputs)
        for i, tensor in zip(wanted, tensors, strict=True):
            arguments[i] = tensor
        return function(*arguments)

    # vjp takes the inputs as independent variables; torch.autograd.grad would follow the graph from one to another
    outputs, vjp = torch.func.vjp(of_wanted, *(inputs[i] for i in wanted))
    found = vjp(tuple(torch.zeros_like(o) if g is None else g for o, g in zip(outputs, grad_outputs, strict=True)))
    grads = [None] * len(inputs)
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    return tuple(grads)


def _is_causal_mask(mask):
    """The op on devices without a kernel of their own: on a GPU its answer is waited for."""
    hidden = torch.ones(mask.shape, dtype=torch.bool, device=mask.device).triu_(1)
    if mask.dtype != torch.bool:
        if not mask.is_floating_point():
            return False  # no kind of mask
        hidden = torch.zeros_like(mask).masked_fill_(hidden, float("-inf"))
    return bool((mask == hidden).all())


_library.impl("is_causal_mask", _is_causal_mask, "CompositeExplicitAutograd")
