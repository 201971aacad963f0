"""fp32 products of linear layers on the CPU: y = x · wᵀ, dx = dy · w, dw = dyᵀ · x."""

import pytest
import torch
import torch.nn.functional as F

from fastattn.ops import _gemm

# rows, d_out, d_in
SHAPES = (
    (1, 512, 512), (1, 2048, 512), (16, 512, 512), (16, 2048, 512), (64, 512, 512), (128, 128, 128), (128, 512, 512),
    (768, 128, 128), (768, 512, 128), (768, 128, 512), (1024, 256, 256), (1024, 512, 512), (1024, 2048, 512),
    (1024, 512, 2048),
)  # fmt: skip


def _onednn(x, weight):
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


PRODUCTS = {
    "y": (F.linear, _onednn, _gemm.linear),
    "dx": (torch.matmul, lambda dy, w: _onednn(dy, w.t()), _gemm.input_grad),
    "dw": (lambda dy, x: dy.t() @ x, lambda dy, x: _onednn(dy.t(), x.t()), _gemm.weight_grad),
}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("product", PRODUCTS)
def test_product(compare, product, shape):
    rows, d_out, d_in = shape
    if not (_gemm._has_kernel or (product == "y" and rows <= _gemm._most_rows)):
        pytest.skip("the CPU kernels do not have this product for this processor")
    x, w, dy = torch.randn(rows, d_in), torch.randn(d_out, d_in), torch.randn(rows, d_out)
    operands = {"y": (x, w), "dx": (dy, w), "dw": (dy, x)}[product]
    torch_product, onednn, ours = PRODUCTS[product]
    candidates = {"torch": lambda: torch_product(*operands)}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        candidates["oneDNN"] = lambda: onednn(*operands)
    candidates["fastattn"] = lambda: ours(*operands)
    compare(candidates, flops=2 * rows * d_out * d_in, tolerance=1e-3, seconds=0.1)
