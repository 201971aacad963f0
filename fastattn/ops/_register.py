"""The only module that uses torch.library.

Raw ops have a schema (in _schemas.py) and a fake implementation, but no autograd: the autograd.Function in the file of
each op calls them, which is the fastest way from Python. The overload name is the backend, the dispatch key the device.

Tracers record operators but not autograd.Functions, so a recorded raw op would have no gradients or could not be saved.
While a tracer is active (`traced_backend`), the op fastattn::<name>_<backend> is called instead. It runs the same
kernel, but has its own autograd formula, which makes it slower.
"""

import functools
import os
import sys
import warnings

import torch
from torch._decomp import register_decomposition
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from fastattn.ops._backends import grad_wanted
from fastattn.ops._libraries import load_library
from fastattn.ops._schemas import DEFINITIONS, NAMES

_BACKENDS = ("native", "triton")
_traced = {backend: f"{backend}_traced" for backend in _BACKENDS}
TRACED = frozenset(_traced.values())
"""The backend names of the ops that tracers record."""

# every call of an op calls them
_is_compiling, _is_tracing = torch.compiler.is_compiling, torch._C._is_tracing
_transforms = torch._C._are_functorch_transforms_active
_n_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_batched, _is_legacy_batched = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
_of_function = vars(torch.autograd.Function)
_torch_apply = _of_function.get("apply")  # None where it is that of C++


def _ask_fx():
    """The cheapest test for torch.fx tracing; from PyTorch 2.14 on, torch's own takes a microsecond."""
    of_thread = getattr(_symbolic_trace, "_is_fx_tracing_tls", None)
    if of_thread is None:
        return _symbolic_trace.is_fx_symbolic_tracing
    return lambda: of_thread.__dict__.get("flag", False)


_is_fx_tracing = _ask_fx()

# our checks read sizes while torch.jit.trace records; torch silences the warning for its own code in the same way
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"fastattn\.")

_library = torch.library.Library("fastattn", "FRAGMENT")
_python_kernels = {}  # (name, backend, device type) -> function
_applies = {}  # autograd.Function -> its `apply` in C++
_fakes = {}  # name -> function


def _define_all():
    load_library("libfastattn_schemas.so")
    for name, definition in DEFINITIONS.items():
        if not torch._C._dispatch_has_kernel(f"fastattn::{name}"):  # True if it has a schema, despite the name
            _library.define(definition)


_define_all()


def register_fake(name, fake):
    """Register the fake implementation of a raw op for all backends.

    PyTorch also calls it if some tensors are on meta and others are not, where it would return uninitialised numbers.

    Args:
        fake: arguments of `name` as fake tensors -> fake results with the shapes, dtypes and strides of the real ones.
    """

    @functools.wraps(fake)
    def watched(*args, **kwargs):
        _excuse_from_lowering(name)
        first = next((arg for arg in args if isinstance(arg, torch.Tensor)), None)
        if type(first) in _PLAIN_TYPES and not first.is_meta:
            raise RuntimeError(f"fastattn::{name}: some tensors are on meta, and the first one is on {first.device}")
        return fake(*args, **kwargs)

    _fakes[name] = watched
    for full in NAMES[name]:
        torch.library.register_fake(f"fastattn::{full}", watched, lib=_library)


def _operator(full):
    name, _, overload = full.partition(".")
    return getattr(getattr(torch.ops.fastattn, name), overload or "default")


class RawOps(dict):
    """{backend: raw op}, and as `direct` the same without OpOverload.__call__, a Python function that takes 0.2 us.

    torch.compile needs the OpOverload: `(ops if is_dynamo_compiling() else ops.direct)[backend](...)`.
    """

    def __init__(self, ops):
        super().__init__(ops)
        self.direct = {backend: op._op for backend, op in ops.items()}


def raw_ops(name):
    """The raw op of each backend, and for each of TRACED the op that tracers record.

    Ops without a traced variant, such as a backward, have the raw op in both places.
    """
    ops = {}
    for backend in _BACKENDS:
        if f"{name}.{backend}" in NAMES[name]:
            ops[backend] = ops[_traced[backend]] = _operator(f"{name}.{backend}")
        if f"{name}_{backend}" in NAMES[name]:
            ops[_traced[backend]] = _operator(f"{name}_{backend}")
    return RawOps(ops)


def register_reference(name, function):
    """Register a raw op in plain PyTorch, for the ONNX exporter and torch.func, which cannot run the kernel.

    Args:
        function: the arguments of `name` -> its results.
    """

    def decomposition(*args, **kwargs):
        # a FakeTensorMode uses the same table, but needs only the metadata of the results
        return (_fakes[name] if get_proxy_mode() is None else function)(*args, **kwargs)

    for full in NAMES[name]:
        register_decomposition(_operator(full), unsafe=True)(decomposition)


def _excuse_from_lowering(name):
    """Let inductor call an op that has a decomposition. With CI in the environment, inductor raises for it."""
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is not None and os.environ.get("CI"):
        lowering.FALLBACK_ALLOW_LIST.add(f"fastattn::{name}")


def register_autograd(name, apply, reference):
    """Register the autograd formula of the ops that tracers record, and their reference.

    Args:
        apply: (one of TRACED, the arguments of `name`) -> its results, through the autograd.Function of the op.
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
        if grad_wanted(*tensors) and not _is_tracing():  # tracing would record the autograd.Function as well
            return apply(_traced[backend], *args)
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
    """The Python kernel behind `fastattn::<name>.<backend>`, for calling it without the dispatcher.

    Passing twenty arguments through the dispatcher to a Python kernel takes longer than preparing a launch. None if
    there is no such kernel, or if a compiler, dispatch mode or tensor subclass must see the call.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return None
    for t in tensors:
        if type(t) is not torch.Tensor and type(t) is not torch.nn.Parameter:
            return None
    return _python_kernels.get((name, backend, "cpu" if tensors[0].is_cpu else tensors[0].device.type))


def checks_operands(runs, *tensors):
    """Whether the kernel itself will refuse operands of wrong shapes, devices or dtypes: a C++ kernel on the CPU.

    Then the op may leave out its own checks, which take a microsecond, and explain a refusal afterwards. Fake kernels
    check nothing, so a compiler, a dispatch mode or a tensor subclass gets the checks of the op.

    Args:
        runs: the backend that runs.
        tensors: all operands, or None.
    """
    if runs != "native" or _is_compiling() or _n_dispatch_modes():
        return False
    for t in tensors:  # noqa: SIM110  all() takes twice as long
        if t is not None and (type(t) not in _PLAIN_TYPES or not t.is_cpu):
            return False
    return True


def needs_reference():
    """Whether a functorch transform or forward-mode AD is active, in which raw ops would silently lose tangents."""
    return _transforms() or forward_ad._current_level >= 0


def traced_backend(runs):
    """The backend to call, given the active tracers and transforms.

    Args:
        runs: the backend from `choose`.
    Returns: one of TRACED if a tracer records the call: torch.jit.trace, or torch.export or make_fx in grad mode, but
        not torch.compile. Without gradients, torch.export and make_fx record the raw ops, which skip the outputs that
        only a backward needs. "reference" if raw ops cannot run, as in `needs_reference`. Otherwise `runs`.
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
    return _traced[runs] if is_traced else runs


def is_recorded(tensor):
    """Whether this call is recorded for later runs: by torch.jit.trace, torch.fx, a FakeTensorMode or a CUDA graph.

    The record may run on other tensors or values than those of this call. torch.compile does not count.
    """
    if torch.compiler.is_compiling():  # it can trace none of the tests below
        return False
    return (
        torch._C._is_tracing()
        or _is_fx_tracing()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def apply_is_patched():
    """Whether a tool has replaced `torch.autograd.Function.apply`, as profilers do to see each call."""
    return _of_function.get("apply") is not _torch_apply


def apply(function, *args):
    """`function.apply(*args)` of an autograd.Function; under torch.compile, repeated tensors become views.

    torch.compile cannot trace an autograd.Function that gets the same tensor twice. In eager mode without a transform,
    the checks that torch makes in Python are left out: a small call notices them.
    """
    if _is_compiling():
        return function.apply(*_distinct(args))
    if _transforms() or apply_is_patched():
        return function.apply(*args)  # raises under a transform: our functions have no rules for them
    return (_applies.get(function) or eager_apply(function))(*unwrap_dead_wrappers(args))


# the names in the code of these methods of torch, one set for each form that they have had since PyTorch 2.11
_APPLY_OF_FUNCTION = (
    {
        "_is_setup_context_defined", "setup_context", "forward", "torch", "_C", "_are_functorch_transforms_active",
        "_functorch", "utils", "unwrap_dead_wrappers", "super", "apply", "RuntimeError", "custom_function_call",
    },
)  # fmt: skip
_APPLY_OF_NODE = (
    {"_forward_cls", "backward", "vjp", "Function", "RuntimeError"},
    {"_forward_cls", "_get_user_fn", "getattr", "list"},
)


def _is_known(method, forms):
    code = getattr(method, "__code__", None)
    return code is not None and set(code.co_names) in forms and {*code.co_freevars} <= {"__class__"}


def eager_apply(function):
    """The `apply` of torch's C++ that `Function.apply` calls, for eager mode without a transform.

    Its node calls the backward without a detour too. A detour is left out only where its code in the installed PyTorch
    has a form that we know; otherwise this is `function.apply`. From PyTorch 2.14 on, `Function.apply` is that of C++.
    """
    if _is_known(torch.autograd.function.BackwardCFunction.apply, _APPLY_OF_NODE):
        function._backward_cls.apply = function.backward
    known = _is_known(torch.autograd.Function.apply, _APPLY_OF_FUNCTION)
    _applies[function] = super(torch.autograd.Function, function).apply if known else function.apply
    return _applies[function]


def _distinct(args):
    found = []
    for arg in args:
        repeated = isinstance(arg, torch.Tensor) and any(arg is other for other in found)
        found.append(arg.view_as(arg) if repeated else arg)
    return found


def is_differentiated(dy):
    """Whether torch must see the ops of a backward: create_graph=True, is_grads_batched=True, or vmap over it.

    An op that returns a list has no batching rule, and the rule of the others is a loop.
    """
    return torch.is_grad_enabled() or _is_batched(dy) or _is_legacy_batched(dy)


def differentiate(function, inputs, grad_outputs):
    """Differentiable gradients, computed by the reference: for backward(create_graph=True).

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

    # vjp treats the inputs as independent; torch.autograd.grad would follow the graph from one input to another
    outputs, vjp = torch.func.vjp(of_wanted, *(inputs[i] for i in wanted))
    found = vjp(tuple(torch.zeros_like(o) if g is None else g for o, g in zip(outputs, grad_outputs, strict=True)))
    grads = [None] * len(inputs)
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    return tuple(grads)


def _is_causal_mask(mask):
    """The op on devices without a kernel of their own. On a GPU it synchronises."""
    hidden = torch.ones(mask.shape, dtype=torch.bool, device=mask.device).triu_(1)
    if mask.dtype != torch.bool:
        if not mask.is_floating_point():
            return False  # not a mask
        hidden = torch.zeros_like(mask).masked_fill_(hidden, float("-inf"))
    return bool((mask == hidden).all())


_library.impl("is_causal_mask", _is_causal_mask, "CompositeExplicitAutograd")
