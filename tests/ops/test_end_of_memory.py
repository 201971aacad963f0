"""No CPU kernel reads past the end of an operand, not even a value that it does not use."""

import pytest
import torch
from memory_guard import at_the_end_of_memory
from op_cases import OPS
from processes import LOWER_CAPABILITIES, run_on_instruction_set

import fastattn
from fastattn.ops._backends import why_not_available

REASON = why_not_available("native", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no C++ kernels for the CPU: {REASON}")


def check(name, dtype):
    """Operands that end where memory ends: such a read ends the process, so pytest names this test as crashed."""
    call, inputs, *_ = OPS[name]

    def run(place):
        torch.manual_seed(0)
        leaves = [place(t.detach().to(dtype)).requires_grad_() for t in inputs]
        with fastattn.use_backend("native"):
            found = call(*leaves)
        found = found if isinstance(found, tuple) else (found,)
        wanted = [t for t in found if t.requires_grad]
        flowing = [place(torch.ones_like(t)) for t in wanted]
        return [*found, *torch.autograd.grad(wanted, leaves, flowing, allow_unused=True)]

    for got, expected in zip(run(at_the_end_of_memory), run(torch.clone), strict=True):
        assert (got is None and expected is None) or torch.equal(got, expected), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPS)
def test_of_every_op(name, dtype):
    check(name, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("seqlen", "head_dim"), [(1, 8), (3, 31), (17, 64)])
def test_of_attention_on_a_cache(seqlen, head_dim, dtype):
    q, k, v = (torch.randn(2, n, 2, head_dim).to(dtype).transpose(1, 2) for n in (seqlen, 33, 33))

    def run(place):
        tensors = [place(t.transpose(1, 2)).transpose(1, 2) for t in (q, k, v)]
        lengths = place(torch.tensor([33, 18], dtype=torch.int32))
        return fastattn.attention_decode(*tensors, cache_seqlens=lengths, backend="native")

    assert torch.equal(run(at_the_end_of_memory), run(torch.clone))


@pytest.mark.parametrize("capability", LOWER_CAPABILITIES)
def test_on_lower_instruction_sets(capability):
    run_on_instruction_set(capability, """
import torch, test_end_of_memory as these
for name in these.OPS:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        print(name, dtype, flush=True)
        these.check(name, dtype)
""")  # fmt: skip
