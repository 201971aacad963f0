"""Host time of a call on tiny tensors; a round is 100 calls, so divide by 100."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, verify_equal

import fastattn.nn

CALLS = 100


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return torch.randn(2, 8, device=DEVICE), torch.randn(8, device=DEVICE), torch.randn(8, device=DEVICE)


def repeated(fn):
    def run():
        for _ in range(CALLS):
            y = fn()
        return y

    return run


def test_layer_norm_without_grad(compare, tiny):
    x, weight, bias = tiny
    compare(
        {
            "torch": repeated(lambda: F.layer_norm(x, (8,), weight, bias)),
            "fastattn": repeated(lambda: fastattn.layer_norm(x, weight, bias)),
        }
    )


def test_layer_norm_forward_backward(compare, tiny):
    x, weight, bias = (t.requires_grad_() for t in tiny)
    dy = torch.randn_like(x)

    def both(fn):
        return repeated(lambda: torch.autograd.grad(fn(), (x, weight, bias), dy))

    compare(
        {
            "torch": both(lambda: F.layer_norm(x, (8,), weight, bias)),
            "fastattn": both(lambda: fastattn.layer_norm(x, weight, bias)),
        }
    )


def test_encoder_layer_step(compare):
    """Forward and backward of a layer of width 16 on two tokens."""
    x = torch.randn(1, 2, 16, device=DEVICE)
    dy = torch.randn_like(x)

    def both(layers):
        torch.manual_seed(0)
        layer = layers.TransformerEncoderLayer(16, 1, 64, 0.0, "gelu", batch_first=True, device=DEVICE)
        parameters = list(layer.parameters())
        return repeated(lambda: torch.autograd.grad(layer(x), parameters, dy))

    compare({"torch": both(torch.nn), "fastattn": both(fastattn.nn)})


def test_self_attention_step(compare):
    """Forward and backward of MultiheadAttention of width 16 on two tokens."""
    x = torch.randn(1, 2, 16, device=DEVICE)
    dy = torch.randn_like(x)

    def both(layers):
        torch.manual_seed(0)
        module = layers.MultiheadAttention(16, 1, batch_first=True, device=DEVICE)
        parameters = list(module.parameters())
        return repeated(lambda: torch.autograd.grad(module(x, x, x, need_weights=False)[0], parameters, dy))

    compare({"torch": both(torch.nn), "fastattn": both(fastattn.nn)})


def test_attention_decode(compare):
    q, k, v = torch.randn(3, 1, 2, 1, 8, device=DEVICE)
    length = torch.ones(1, dtype=torch.int32, device=DEVICE)
    compare(
        {
            "torch": repeated(lambda: F.scaled_dot_product_attention(q, k, v)),
            "fastattn": repeated(lambda: fastattn.attention_decode(q, k, v, cache_seqlens=length)),
        }
    )


def test_attention_without_grad(compare):
    q, k, v = torch.randn(3, 1, 2, 4, 8, device=DEVICE)
    compare(
        {
            "torch": repeated(lambda: F.scaled_dot_product_attention(q, k, v)),
            "fastattn": repeated(lambda: fastattn.attention(q, k, v)),
        }
    )


class NoLaunch:
    """Replaces a Triton kernel: the launch is prepared but, while `skips` is true, not made."""

    skips = False

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.skip if NoLaunch.skips else self.kernel[grid]

    def skip(self, *args, **kwargs):
        return None


@pytest.mark.skipif(
    fastattn.backends()[DEVICE]["triton"] != "available",
    reason="the Triton backend takes CPU tensors only under TRITON_INTERPRET=1",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_triton_attention_host_time_without_launch(compare, monkeypatch, direction, dtype):
    """The time of Python before Triton's own launch, which is skipped. `fwd`: a call; `bwd`: its backward by autograd.

    fp32 also reads the TF32 setting. PyTorch's row is its whole CPU or GPU op, as a scale for the speed of the machine.
    """
    from fastattn.kernels import attention_bwd as backward
    from fastattn.kernels import attention_fwd as forward

    monkeypatch.setattr(forward, "attention_fwd_kernel", NoLaunch(forward.attention_fwd_kernel))
    for name in ("attention_preprocess_kernel", "attention_dkdv_kernel", "attention_dq_kernel"):
        monkeypatch.setattr(backward, name, NoLaunch(getattr(backward, name)))
    q, k, v = torch.randn(3, 2, 4, 64, 32, dtype=dtype, device=DEVICE)
    inputs = [t.requires_grad_(direction == "bwd") for t in (q, k, v)]
    calls = {
        "torch": lambda: F.scaled_dot_product_attention(q, k, v),
        "fastattn": lambda: fastattn.attention(q, k, v, backend="triton"),
    }
    if direction == "bwd":
        outs = {name: call() for name, call in calls.items()}
        do = torch.ones_like(q)
        calls = {
            name: lambda out=out: torch.autograd.grad(out, inputs, do, retain_graph=True) for name, out in outs.items()
        }
    verify_equal({name: call() for name, call in calls.items()}, 1e-2)
    monkeypatch.setattr(NoLaunch, "skips", True)
    candidates = {name: repeated(call) for name, call in calls.items()}
    compare(candidates, verify={"torch": candidates["torch"]})
