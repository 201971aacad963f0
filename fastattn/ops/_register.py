"""The only place that talks to torch.library.

Raw ops have a schema (in _schemas.py) and a fake, and no autograd: an autograd.Function in the op's file stands outside
of them, which is the cheapest way from Python. The overload name is the backend, the dispatch key the device.
"""

import torch
from torch.autograd import forward_ad
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from fastattn._native import load_library
from fastattn.ops._schemas import DEFINITIONS

_library = torch.library.Library("fastattn", "FRAGMENT")
_python_kernels = {}  # (name, backend, device type) -> function


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
    for overload in DEFINITIONS:
        if overload.partition(".")[0] == name:
            torch.library.register_fake(f"fastattn::{overload}", fake, lib=_library)


def implement(name, backend, device, function):
    """Register a Python function as the kernel of `fastattn::<name>.<backend>` for device "CPU" or "CUDA"."""
    _library.impl(f"{name}.{backend}", function, device)
    _python_kernels[name, backend, device.lower()] = function


def python_kernel(name, backend, device, *tensors):
    """What `fastattn::<name>.<backend>` would end in on a device type, where it may be called without the dispatcher.

    Passing twenty arguments to a kernel in Python through the dispatcher takes longer than preparing a launch. None
    where there is no such kernel, or where somebody looks on: a compiler, a dispatch mode, a subclass of Tensor.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return None
    for t in tensors:
        if type(t) is not torch.Tensor and type(t) is not torch.nn.Parameter:
            return None
    return _python_kernels.get((name, backend, device))


def needs_reference():
    """A functorch transform or forward-mode AD is active: raw ops would lose tangents without an error."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_recorded(tensor):
    """This call is recorded for later ones: by torch.jit.trace, torch.fx, a FakeTensorMode or in a CUDA graph.

    What tensors hold now, or are, is then not what they hold when the record runs. A compiler is not meant.
    """
    if torch.compiler.is_compiling():  # it traces no question below
        return False
    return (
        torch._C._is_tracing()
        or is_fx_symbolic_tracing()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )


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
