"""Host time of one call on tensors so small that nothing else counts; 100 calls a round, so divide by 100."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE

import fastattn

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
