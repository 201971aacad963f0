"""Attention on a GPU: each backend of PyTorch, FlexAttention and our kernels, all in one run.

Each SDPA candidate is fixed to one backend, so every row states what really ran. Our backends are named too. TFLOP/s
count 4 operations of a forward and 10 of a backward per visible score and column.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import CUDA
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn

pytestmark = pytest.mark.skipif(not CUDA, reason="no GPU")

SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
# the most important first: a run may be cut short
SHAPES = [(16, 16, 4096, 128), (16, 16, 4096, 64), (2, 16, 16384, 128), (2, 16, 16384, 64), (16, 16, 1024, 128)]
SHAPES += [(16, 16, 1024, 64), (16, 16, 4096, 96), (8, 16, 4096, 192), (8, 16, 4096, 256)]


def flex(q, k, v, causal):
    """FlexAttention compiled for these sizes."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)
    mask = None
    if causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2], device="cuda")
    return lambda: compiled(q, k, v, block_mask=mask)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_attention_by_backend(compare, shape, causal, direction):
    batch, n_heads, seqlen, head_dim = shape
    backward = direction == "bwd"
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, do = (
        torch.randn(shape, generator=generator, device="cuda").bfloat16().requires_grad_(backward) for _ in range(4)
    )

    def pinned(which):
        def call():
            with sdpa_kernel(which):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return call

    forwards = {f"sdpa {name}": pinned(which) for name, which in SDPA.items()}
    if seqlen == 4096 and head_dim in (64, 128):  # it compiles once per size, which takes longer than the measurement
        forwards["flex"] = flex(q, k, v, causal)
    ours = {"native": {}, "triton": {}}
    if backward and head_dim > 128:
        print("fastattn native left out: its backward ends at head dim 128, and triton has a row of its own")
        del ours["native"]
    elif backward:
        ours = {"native": {"deterministic": False}, "native, deterministic": {"deterministic": True}, "triton": {}}
    for name, kwargs in ours.items():
        kwargs |= {"causal": causal, "backend": name.partition(",")[0]}
        forwards[f"fastattn {name}"] = lambda kwargs=kwargs: fastattn.attention(q, k, v, **kwargs)
    candidates = {}
    for name, forward in forwards.items():
        try:
            out = forward()
        except Exception as error:  # an unsupported backend: its row is missing from the table, and the log says why
            print(f"{name} left out: {str(error).splitlines()[0]}")
            continue
        candidates[name] = forward
        if backward:
            candidates[name] = lambda out=out: torch.autograd.grad(out, (q, k, v), do, retain_graph=True)
    visible = 0.5 if causal else 1.0
    compare(
        candidates,
        tolerance=5e-2,
        flops=(10 if backward else 4) * batch * n_heads * seqlen**2 * head_dim * visible,
        dtype=torch.bfloat16,
    )
