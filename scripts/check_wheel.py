"""Calls every op of the installed fastattn on its compiled kernels and on the reference, forward and backward.

Run it with the Python of the environment that has the wheel, and outside of this checkout; scripts/check_wheel.sh does.
"""

import importlib
import os
import subprocess
import sys
import sysconfig

import torch

import fastattn
from fastattn import _native
from fastattn.ops._libraries import build_info

PACKAGE = os.path.dirname(_native.__file__)


def calls():
    """(name, function, its tensors) for each op."""
    q, k, v = torch.randn(3, 2, 4, 33, 64)
    x, weight, up, down = (torch.randn(*size) for size in ((9, 64), (64,), (128, 64), (64, 128)))
    target, lengths = torch.randint(64, (9,)), torch.tensor([20, 33], dtype=torch.int32)
    angles = torch.arange(33.0)[:, None] / torch.arange(1.0, 33.0)
    yield "attention", lambda *a: fastattn.attention(*a, causal=True, dropout_p=0.1), (q, k, v)
    yield "scaled_dot_product_attention", lambda *a: fastattn.scaled_dot_product_attention(*a), (q, k, v)
    yield "dropout", lambda *a: fastattn.dropout(*a, 0.3), (x,)
    yield "layer_norm", lambda *a: fastattn.layer_norm(*a), (x, weight, weight)
    yield "rms_norm", lambda *a: fastattn.rms_norm(*a), (x, weight)
    yield "feed_forward", lambda x, u, d: fastattn.feed_forward(x, u, None, d, None, activation="gelu"), (x, up, down)
    yield "linear_cross_entropy", lambda x, w: fastattn.linear_cross_entropy(x, w, target), (x, up[:64])
    yield "rotary_embedding", lambda *a: fastattn.rotary_embedding(*a, angles.cos(), angles.sin()), (q,)
    yield "attention_decode", lambda: fastattn.attention_decode(q[:, :, :1], k, v, cache_seqlens=lengths), ()


def results(backend, function, tensors):
    """The output, and the gradients of the tensors."""
    torch.manual_seed(0)
    inputs = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    with fastattn.use_backend(backend):
        out = function(*inputs)
        return [out, *(torch.autograd.grad(out.square().sum(), inputs) if inputs else ())]


def main():
    info = build_info()
    expected = {"libfastattn_schemas.so", "_cpu.so"}
    assert PACKAGE.startswith(sys.prefix), f"{PACKAGE} is not what was installed into {sys.prefix}"
    assert expected <= set(info["built"]), info["not_built"]
    assert sorted(info["built"]) == sorted(name for name in os.listdir(PACKAGE) if name.endswith(".so")), info["built"]
    assert fastattn.backends()["cpu"]["native"] == "available", fastattn.backends()
    torch.manual_seed(0)
    for name, function, tensors in calls():
        native, reference = (results(backend, function, tensors) for backend in ("native", "reference"))
        for one, other in zip(native, reference, strict=True):
            error = ((one - other).norm() / other.norm()).item()
            assert error < 1e-5, f"{name}: relative error {error}"
    if f"_C{sysconfig.get_config_var('EXT_SUFFIX')}" in info["built"]:
        importlib.import_module("fastattn._C")
    if torch.version.cuda and "_cuda.so" in info["built"]:
        torch.ops.load_library(os.path.join(PACKAGE, "_cuda.so"))
    said = subprocess.run([sys.executable, "-m", "fastattn", "info"], capture_output=True, text=True, check=True).stdout
    assert "cpu native      available" in said, said
    print(
        f"[wheel] Python {sys.version.split()[0]}, torch {torch.__version__}: all ops agree with the reference on"
        f" {_native.cpu_capability()} kernels; CUDA: {fastattn.backends()['cuda']['native']}"
    )


if __name__ == "__main__":
    main()
