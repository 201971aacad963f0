"""Exported layers with named dimensions, saved, loaded and trained on other sizes: what torch.nn lacks, and masks.

`tests/ops/test_tools_records.py` does so for the layers of torch.nn without masks,
`tests/ops/test_dynamic_sizes.py` for ops.
"""

import io

import pytest
import torch
from torch.export import Dim

from fastattn import nn

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of the exporter

E, H = 16, 4


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padding(batch, length):
    return torch.arange(length) >= length - torch.arange(batch)[:, None]


class WithWeights(nn.MultiheadAttention):
    def forward(self, x, padding):
        out, weights = super().forward(x, x, x, padding)
        return out + weights.sum(-1, keepdim=True)


class Masked(nn.TransformerEncoder):
    def forward(self, x, padding):
        return super().forward(x, src_key_padding_mask=padding, is_causal=True)


class Rotated(nn.RotaryEmbedding):
    def forward(self, x, positions):
        q = x.unflatten(-1, (H, E // H)).transpose(1, 2)
        return torch.cat(super().forward(q, q[:, :1], positions=positions), 1)


def stack():
    layer = nn.TransformerEncoderLayer(E, H, 24, 0.0, batch_first=True, norm_first=True, activation="gelu")
    return Masked(layer, 1, nn.RMSNorm(E))


BATCH, LENGTH = Dim("batch", min=2, max=16), Dim("length", min=3, max=64)
EVERY = {0: BATCH, 1: LENGTH}
# the module, inputs for a batch size and a length, and their dimensions
MODULES = {
    "FeedForward": (
        lambda: nn.FeedForward(E, 24, activation="silu", gated=True, recompute=True),
        lambda *sizes: (randn(*sizes, E),), {"x": EVERY},
    ),
    "RotaryEmbedding": (
        lambda: Rotated(E // H, max_seqlen=64), lambda batch, length: (randn(batch, length, E), torch.arange(length)),
        {"x": EVERY, "positions": {0: LENGTH}},
    ),
    "attention weights": (
        lambda: WithWeights(E, H, batch_first=True), lambda *sizes: (randn(*sizes, E), padding(*sizes)),
        {"x": EVERY, "padding": EVERY},
    ),
    "masked stack": (stack, lambda *sizes: (randn(*sizes, E), padding(*sizes)), {"x": EVERY, "padding": EVERY}),
}  # fmt: skip


def trained(module, x, *rest):
    """The output, and the gradients of the input and of the parameters."""
    x = x.clone().requires_grad_()
    out = module(x, *rest)
    parameters = dict(sorted(module.named_parameters()))
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *parameters.values()])]


@pytest.mark.parametrize("named", [None, BATCH, LENGTH], ids=["both", "batch", "length"])
@pytest.mark.parametrize("name", MODULES)
def test_exported_program_is_trained_on_other_sizes(name, named):
    """With both dimensions named, or with one, next to the other as a number."""
    make, inputs, dimensions = MODULES[name]
    dimensions = {
        label: {i: size for i, size in sizes.items() if named in (None, size)} or None
        for label, sizes in dimensions.items()
    }
    torch.manual_seed(0)
    module, file = make(), io.BytesIO()
    torch.export.save(torch.export.export(module, inputs(3, 6), dynamic_shapes=dimensions), file)
    file.seek(0)
    program = torch.export.load(file).module()
    for batch, length in ((5, 9), (2, 3)):
        sizes = 3 if named is LENGTH else batch, 6 if named is BATCH else length
        torch.testing.assert_close(trained(program, *inputs(*sizes)), trained(module, *inputs(*sizes)))


def test_a_rotary_embedding_serves_the_rows_of_its_tables():
    class WithoutPositions(nn.RotaryEmbedding):
        def forward(self, x):
            return super().forward(x)

    rotary, x = WithoutPositions(4, max_seqlen=64), randn(2, 3, 6, 4)
    with pytest.raises(torch._dynamo.exc.UserError, match=r"max=64"):
        torch.export.export(rotary, (x,), dynamic_shapes=({2: Dim("length")},))
    program = torch.export.export(rotary, (x,), dynamic_shapes=({2: Dim("length", max=64)},)).module()
    torch.testing.assert_close(program(randn(2, 3, 64, 4)), rotary(randn(2, 3, 64, 4)))
