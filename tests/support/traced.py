"""Runs every op and every layer with fake tensors on "cuda": called, compiled and exported, forward and backward.

The process pretends to have a Hopper GPU and all kernels. Fake tensors have no values, so the fake implementation of a
raw op runs in place of its kernel. Prints {title: fault or ""} as JSON: the results must have the shapes, dtypes and
devices of the reference's. A PyTorch without CUDA does it without gradients, because its autograd has no streams for
such tensors. Tests run this file in a process of its own:

    python tests/support/traced.py BUILD     BUILD: a folder for a small library, if this PyTorch has no CUDA
"""

import ctypes
import functools
import importlib
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import _native, nn
from fastattn.ops import _OPS, _backends, _register

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "gpu"))
import first

ROOT = pathlib.Path(__file__).parents[2]
GRADIENTS = torch.version.cuda is not None
E, H, FF, N, L = 128, 2, 64, 3, 40
LAYER = {"nhead": H, "dim_feedforward": FF, "batch_first": True}
LAYERS = {  # the layer and the shapes of its inputs
    "FeedForward": (lambda: nn.FeedForward(E, FF, activation="silu", gated=True, dropout=0.1), [(N, L, E)]),
    "LayerNorm": (lambda: nn.LayerNorm(E), [(N, L, E)]),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(E, H, batch_first=True), [(N, L, E)] * 3),
    "RMSNorm": (lambda: nn.RMSNorm(E), [(N, L, E)]),
    "RotaryEmbedding": (lambda: nn.RotaryEmbedding(32, max_seqlen=L), [(N, H, L, 64)] * 2),
    "Transformer": (lambda: nn.Transformer(E, H, 1, 1, FF, batch_first=True), [(N, L, E)] * 2),
    "TransformerDecoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(E, **LAYER), 2), [(N, L, E)] * 2,
    ),
    "TransformerDecoderLayer": (lambda: nn.TransformerDecoderLayer(E, **LAYER, norm_first=True), [(N, L, E)] * 2),
    "TransformerEncoder": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(E, **LAYER), 2), [(N, L, E)]),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(E, **LAYER), [(N, L, E)]),
}  # fmt: skip
CALLS = {family.name: family for family in first.FAMILIES}
CALLS["scaled_dot_product_attention"] = first.attention("scaled_dot_product_attention", kv_heads=4)._replace(
    call=lambda q, k, v, backend: fastattn.scaled_dot_product_attention(q, k, v, is_causal=True)
)
# how a case runs, and with which kernels: those of CUDA C++ where they serve, with Triton's for the rest, or Triton's
RUNS = [("called", "native"), ("called", "triton"), ("compiled", "triton"), ("exported", "native")]

# Called only with real tensors: rotary in place copies while a dispatch mode is active, and the pass over the logits is
# called by the kernel of linear_cross_entropy_fwd.
HIDDEN = {"rotary_fwd_", "cross_entropy_fwd"}


@functools.cache
def native_ops():
    """The raw ops that _cuda.so implements."""
    sources = (path.read_text(encoding="utf-8") for path in ROOT.glob("csrc/cuda/*_ops.cpp"))
    return {name for text in sources for name in re.findall(r'm\.impl\("([\w.]+)"', text)}


def triton_ops():
    return {f"{name}.triton" for name, backend, device in _register._python_kernels if device == "cuda"}


def pretend(build):
    if torch.version.cuda is None:
        folder, library = os.path.dirname(torch.__file__), os.path.join(build, "no_guard.so")
        command = ["g++", "-std=c++20", "-shared", "-fPIC", "-o", library, ROOT / "tests/support/no_guard.cpp"]
        subprocess.run([*command, f"-I{folder}/include", f"-L{folder}/lib", "-lc10"], check=True)
        ctypes.CDLL(library)
    torch.Tensor.unflatten = torch._C.TensorBase.unflatten  # Dynamo cannot trace the other one for a subclass
    FakeTensorMode.__deepcopy__ = lambda mode, _: mode  # stacks copy their layers
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    torch._C._dispatch_has_kernel_for_dispatch_key = lambda name, key: (
        has_kernel(name, key) or (key == "CUDA" and name.removeprefix("fastattn::") in native_ops())
    )
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    _backends._ON_REQUEST.clear()
    for name in _native._KERNEL_MODULES:
        importlib.import_module(f"fastattn.kernels.{name}")
    _backends.set_unavailable("triton", "cuda", None)


class Seen(TorchDispatchMode):
    """The ops of a call."""

    def __init__(self):
        super().__init__()
        self.ops = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.ops.add(str(function))
        return function(*args, **(kwargs or {}))


def ours(names):
    """Of the names of ops, those of the raw ops, without the name of the library."""
    return {name.removeprefix("fastattn.").removesuffix(".default") for name in names if name.startswith("fastattn.")}


class Call(torch.nn.Module):
    """A call of an op with its tensors in order."""

    def __init__(self, call, names):
        super().__init__()
        self.call, self.names = call, names

    def forward(self, *tensors):
        return self.call(**dict(zip(self.names, tensors, strict=True)), backend=None)


def made(name):
    """The module of a case and its inputs, on the default device."""
    if name in LAYERS:
        layer, shapes = LAYERS[name]
        torch.set_default_dtype(torch.bfloat16)
        made = layer().requires_grad_(GRADIENTS), [torch.empty(s, requires_grad=GRADIENTS) for s in shapes]
        torch.set_default_dtype(torch.float32)
        return made
    family = CALLS[name]
    given = {
        label: torch.empty(shape, dtype=family.dtype, requires_grad=family.grad and GRADIENTS)
        for label, shape in family.shapes.items()
    }
    given |= family.fixed()
    return Call(family.call, list(given)), list(given.values())


def described(t):
    return None if t is None else [list(t.shape), str(t.dtype), str(t.device)]


def trained(module, inputs):
    """[shape, dtype, device] of the outputs and of all gradients."""
    out = module(*inputs)
    results = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
    leaves = [t for t in (*inputs, *module.parameters()) if t.requires_grad]
    if leaves:
        results += torch.autograd.grad(sum(t.float().sum() for t in results), leaves, allow_unused=True)
    return [described(t) for t in results]


def compiled(module, seen):
    def record(graph, _):
        seen.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    return torch.compile(module, backend=aot_autograd(fw_compiler=record, bw_compiler=record), fullgraph=True)


def exported(module, inputs, seen):
    program = torch.export.export(module, tuple(inputs), strict=False)
    seen.update(str(node.target) for node in program.graph.nodes)
    return program.module()


def fault(name, how, backend, reached):
    """What is wrong with a case, or "". Adds the raw ops that it reaches to `reached`."""
    seen = set()
    module, inputs = made(name)
    try:
        with fastattn.use_backend("reference"):
            expected = trained(module, inputs)
    except DataDependentOutputException:  # it reads the ends of packed sequences; the result is like q
        expected = [described(t) for t in inputs[:1] + [t for t in inputs if t.requires_grad]]
    if how == "called":
        with Seen() as calls:
            got = trained(module, inputs)
            if GRADIENTS:
                with torch.no_grad():
                    module(*inputs)
        seen = calls.ops
    else:
        got = trained(compiled(module, seen) if how == "compiled" else exported(module, inputs, seen), inputs)
    reached |= ours(seen)
    if got != expected:
        return f"{got} instead of {expected}"
    if not ours(seen):
        return "no op of ours"
    others = [op for op in ours(seen) if backend == "triton" and "triton" not in op]
    return f"not by Triton: {others}" if others else ""


def unreached(backend, reached):
    """The raw ops with a kernel for CUDA that no case called."""
    wanted = {name for name in native_ops() if name.endswith(".native")} if backend == "native" else triton_ops()
    hidden = {name for name in wanted if name.partition(".")[0] in HIDDEN or ("bwd" in name and not GRADIENTS)}
    return sorted(wanted - hidden - reached)


def uncalled():
    """The public ops that no case calls."""
    called = set()
    for op, function in _OPS.items():
        setattr(fastattn, op, lambda *a, op=op, f=function, **k: called.add(op) or f(*a, **k))
    for name in CALLS:
        module, inputs = made(name)
        module(*inputs)
    for op, function in _OPS.items():
        setattr(fastattn, op, function)
    return sorted(set(_OPS) - called)


def main(build):
    pretend(build)
    found = {}
    with FakeTensorMode(), torch.device("cuda"):
        found["uncalled"] = uncalled()
        for backend in ("native", "triton"):
            _backends.set_unavailable("native", "cuda", None if backend == "native" else "left out")
            reached = set()
            for how, name in itertools.product(("called", "compiled", "exported"), (*CALLS, *LAYERS)):
                if (how, backend) in RUNS:
                    torch._dynamo.reset()
                    try:
                        found[f"{how} {backend} {name}"] = fault(name, how, backend, reached)
                    except Exception as error:  # a line of the report
                        found[f"{how} {backend} {name}"] = f"{type(error).__name__}: {error}"
            found[f"unreached {backend}"] = unreached(backend, reached)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
