"""ONNX export of unmodified layers and ops; onnxruntime gives the same results."""

import pytest
import torch

import fastattn
from fastattn import nn

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of the exporter

E, H = 16, 4
LAYER = {"dim_feedforward": 24, "dropout": 0.0, "batch_first": True}


def run(model, inputs):
    """What onnxruntime computes for a model given as bytes."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    feed = {given.name: x.numpy() for given, x in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


def exported(module, inputs, **options):
    return torch.onnx.export(module, inputs, dynamo=True, verbose=False, **options).model_proto.SerializeToString()


class Masked(torch.nn.Module):
    """A stack with a causal and a padding mask and a final norm."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, H, norm_first=True, activation="gelu", **LAYER)
        self.stack = nn.TransformerEncoder(layer, 1, nn.RMSNorm(E))

    def forward(self, x, padding):
        return self.stack(x, src_key_padding_mask=padding, is_causal=True)


@pytest.mark.parametrize("from_program", [False, True])
def test_stack_with_dynamic_sizes(from_program):
    torch.manual_seed(0)
    module = Masked().eval()
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=64)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    shapes = {"x": {0: batch, 1: length}, "padding": {0: batch, 1: length}}
    if from_program:
        program = torch.export.export(module, (torch.randn(3, 6, E), padding), dynamic_shapes=shapes)
        model = exported(program, None)
    else:
        model = exported(module, (torch.randn(3, 6, E), padding), dynamic_shapes=shapes)
    x, padding = torch.randn(2, 9, E), torch.arange(9) >= torch.tensor([9, 5])[:, None]
    torch.testing.assert_close(run(model, (x, padding)), module(x, padding).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_loss_with_dynamic_sizes(reduction):
    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(10, E))

        def forward(self, x, target):
            return fastattn.linear_cross_entropy(x, self.weight, target, reduction=reduction, softcap=5.0)

    torch.manual_seed(0)
    module = Loss()
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=1, max=64)}
    shapes = {"x": sizes, "target": sizes}
    model = exported(module, (torch.randn(3, 5, E), torch.randint(0, 10, (3, 5))), dynamic_shapes=shapes)
    inputs = torch.randn(4, 7, E), torch.randint(0, 10, (4, 7))
    inputs[1][0, :3] = -100
    torch.testing.assert_close(run(model, inputs), module(*inputs).detach(), rtol=1e-4, atol=1e-5)


def test_decoder_layer():
    torch.manual_seed(0)
    module, inputs = nn.TransformerDecoderLayer(E, H, **LAYER).eval(), (torch.randn(2, 5, E), torch.randn(2, 7, E))
    got = run(exported(module, inputs), inputs)
    torch.testing.assert_close(got, module(*inputs).detach(), rtol=1e-4, atol=1e-5)


OPS = {
    "attention with features": lambda q, k: fastattn.attention(q, k, k, softcap=3.0, causal=True, window=(2, -1)),
    "rotary_embedding": lambda q, k: fastattn.rotary_embedding(q, k[0, 0, :, :4], k[0, 1, :, :4]),
    "linear_cross_entropy": lambda q, k: fastattn.linear_cross_entropy(
        q.flatten(0, 2), k.flatten(0, 2), torch.arange(48) % 24, label_smoothing=0.1, z_loss=0.1
    ),
}


@pytest.mark.parametrize("op", OPS)
def test_ops(op):
    class Module(torch.nn.Module):
        def forward(self, q, k):
            return OPS[op](q, k)

    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    got = run(exported(Module(), inputs), inputs)
    torch.testing.assert_close(got, OPS[op](*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["LayerNorm", "MultiheadAttention", "TransformerEncoderLayer"])
def test_exporter_by_torchscript(name, tmp_path):
    torch.manual_seed(0)
    arguments = {"LayerNorm": (E,), "MultiheadAttention": (E, H, 0.0, True, False, False, None, None, True)}
    module = getattr(nn, name)(*arguments.get(name, (E, H, 24, 0.0))).eval()
    inputs = (torch.randn(2, 5, E),) * (3 if name == "MultiheadAttention" else 1)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(module, inputs, path, dynamo=False)
    out = module(*inputs)
    expected = (out[0] if isinstance(out, tuple) else out).detach()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {given.name: inputs[0].numpy() for given in session.get_inputs()}
    torch.testing.assert_close(torch.from_numpy(session.run(None, feed)[0]), expected, rtol=1e-4, atol=1e-5)
