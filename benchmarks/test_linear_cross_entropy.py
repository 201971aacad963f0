"""linear_cross_entropy against F.linear and F.cross_entropy, and its pass over the logits alone.

flops counts the products: one forward, two backward. With -s, the peak memory of PyTorch's allocator in excess of
inputs and gradients is printed.
"""

import os
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import CUDA, DEVICE, backend_of_raw_op

import fastattn

sys.path.append(os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tests"))
from allocated import allocated_peak

# tokens, d_model, vocabulary
SHAPES = (
    ((32768, 4096, 128_256), (8192, 2048, 50304))
    if CUDA
    else ((1024, 128, 50257), (2048, 256, 8192), (4096, 512, 1024))
)
# torch's bf16 products take minutes on a processor without bf16 instructions
BF16 = CUDA or torch.ops.mkldnn._is_mkldnn_bf16_supported()
DTYPES = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if BF16 else {})


def peak(step):
    if not CUDA:
        return allocated_peak(step)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = step()
    return torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in results)


@pytest.mark.parametrize("direction", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_linear_cross_entropy(compare, shape, dtype, direction):
    tokens, d_model, vocab = shape
    backward = direction == "fwd_bwd"
    torch.manual_seed(0)
    x = torch.randn(tokens, d_model, device=DEVICE).to(dtype).requires_grad_(backward)
    weight = (torch.randn(vocab, d_model, device=DEVICE) * d_model**-0.5).to(dtype).requires_grad_(backward)
    target = torch.randint(vocab, (tokens,), device=DEVICE)

    def step(function):
        def run():
            loss = function()
            return (loss, *torch.autograd.grad(loss, (x, weight))) if backward else (loss,)

        return run

    candidates = {
        "torch": step(lambda: F.cross_entropy(F.linear(x, weight), target)),
        "fastattn": step(lambda: fastattn.linear_cross_entropy(x, weight, target)),
    }
    compare(
        candidates,
        tolerance=1e-4 if dtype == torch.float32 else 4e-2,
        flops=(3 if backward else 1) * 2 * tokens * d_model * vocab,
        dtype=dtype,
        seconds=10,
    )
    peaks = {name: peak(candidate) / 2**20 for name, candidate in candidates.items()}
    print(f"\n{shape} {direction}: " + ", ".join(f"{name} {mib:.0f} MiB" for name, mib in peaks.items()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cross_entropy_pass(compare, dtype):
    """The raw op, which overwrites the logits with their gradient, against F.cross_entropy forward and backward."""
    rows, cols = (8192, 50304) if CUDA else (256, 50304)
    torch.manual_seed(0)
    logits = torch.randn(rows, cols, device=DEVICE).to(dtype).requires_grad_()
    buffer = logits.detach().clone()
    target = torch.randint(cols, (rows,), device=DEVICE)
    backend = backend_of_raw_op("linear_cross_entropy")
    op = getattr(torch.ops.fastattn.cross_entropy_fwd, backend)

    def in_torch():
        loss = F.cross_entropy(logits, target, reduction="none")
        return loss, *torch.autograd.grad(loss, logits, torch.ones_like(loss))

    def ours():
        return op(buffer, target, None, -100, 0.0, 0.0, 0.0, True), buffer

    def verified():
        buffer.copy_(logits.detach())
        return ours()

    compare(
        {
            "torch": in_torch,
            "fastattn": ours,
        },  # our later rounds read gradients instead of logits, which is the same work
        verify={"torch": in_torch, "fastattn": verified},
        tolerance=1e-4 if dtype == torch.float32 else 4e-2,
        nbytes=3 * logits.nbytes,
    )
