"""What one step of an encoder layer with dropout runs: only attention, products and fused passes, counted.

Counted are the ops that reach the dispatcher on the CPU, without views and allocations, and the kernels that Triton
launches in the interpreter. docs/lab/gpu-rows.md has the table.
"""

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn.ops._backends import why_not_available

VIEWS = {"view", "t", "transpose", "permute", "unbind", "detach", "_unsafe_view", "empty", "empty_strided", "new_empty"}
PRODUCTS = ("addmm", "mm", "gemm", "gemv", "linear")


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        if name not in VIEWS:
            self.ops["product" if name in PRODUCTS else name] += 1
        return function(*args, **(kwargs or {}))


def layer_and_input(norm_first):
    layer = fastattn.nn.TransformerEncoderLayer(32, 2, 64, 0.1, "gelu", batch_first=True, norm_first=norm_first)
    return layer.train(), torch.randn(2, 8, 32, requires_grad=True)


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post_norm", "pre_norm"])
def test_ops_of_a_training_step(norm_first, backend):
    if reason := why_not_available(backend, "cpu"):
        pytest.skip(reason)
    layer, x = layer_and_input(norm_first)
    with fastattn.use_backend(backend):
        with Counted() as forward:
            y = layer(x)
        dy = torch.randn_like(y)
        with Counted() as backward:
            y.backward(dy)
    passes = {"norm_fwd": 2, "activation_fwd": 1} | ({"dropout_fwd": 1} if norm_first else {})
    # each dropout draws its seed and offset
    assert forward.ops == {"attention_fwd": 1, "product": 4, "randint": 4} | passes

    passes = {"norm_bwd": 2, "activation_bwd": 1} | ({"dropout_fwd": 1} if norm_first else {})
    for name, count in ({"attention_bwd": 1, "product": 8} | passes).items():
        assert backward.ops.pop(name) == count, name
    # bias gradients that no norm computes: of in_proj, and before the last dropout; q, k and v together; two branches
    most = {"sum": 2 if norm_first else 1, "stack": 1, "add": 1 if norm_first else 2}
    assert not backward.ops - collections.Counter(most), backward.ops


@pytest.mark.parametrize("norm_first", [False, True], ids=["post_norm", "pre_norm"])
def test_triton_launches_of_a_training_step(norm_first, monkeypatch):
    if torch.cuda.is_available() or why_not_available("triton", "cpu"):
        pytest.skip("counted in the interpreter, which runs where there is Triton and no GPU")
    import triton.runtime.interpreter

    launches = collections.Counter()
    launch = triton.runtime.interpreter.GridExecutor.__call__

    def counted(self, *args, **kwargs):
        launches[self.fn.__name__] += 1
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(triton.runtime.interpreter.GridExecutor, "__call__", counted)
    layer, x = layer_and_input(norm_first)
    with fastattn.use_backend("triton"):
        y = layer(x)
        forward = dict(launches)
        y.sum().backward()
    backward = launches - collections.Counter(forward)
    passes = {"norm_fwd_kernel": 2, "activation_fwd_kernel": 1} | ({"dropout_fwd_kernel": 1} if norm_first else {})
    assert forward == {"attention_fwd_kernel": 1} | passes
    passes = {"norm_bwd_kernel": 2, "activation_bwd_kernel": 1, "add_up_kernel": 3}
    passes |= {"dropout_fwd_kernel": 1} if norm_first else {}
    attention = {name: count for name, count in backward.items() if name.startswith("attention")}
    assert sum(attention.values()) == 3, attention  # delta, then dk and dv, then dq
    assert {name: count for name, count in backward.items() if name not in attention} == passes
