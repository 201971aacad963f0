"""Inference of an encoder of six layers: eager torch.nn, ONNX Runtime, OpenVINO, fastattn.

The peers run the graph that torch.onnx exports from the torch.nn model. Under --benchmark-disable the layers are small.
"""

import copy

import pytest
import torch

import fastattn

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the peers run on the CPU")

SIZES = [(1, 16), (1, 128), (8, 128), (1, 512)]  # batch, seqlen


@pytest.fixture(scope="module")
def encoder(request):
    torch.manual_seed(0)
    d_model, n_layer = (64, 2) if request.config._benchmarksession.disabled else (512, 6)
    layer = torch.nn.TransformerEncoderLayer(d_model, 8, 4 * d_model, 0.1, "gelu", batch_first=True)
    return torch.nn.TransformerEncoder(layer, n_layer, enable_nested_tensor=False).eval()


def exported(encoder, x, folder):
    """The path of the ONNX file of the encoder for inputs of the shape of x; skips without the packages."""
    pytest.importorskip("onnxscript", reason="onnxscript, which exports the peers' graph, is not installed")
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        path = folder / "encoder.onnx"
        torch.onnx.export(encoder, (x,), str(path), dynamo=True, verbose=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    return str(path)


def onnx_runtime(path, x):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name, array = session.get_inputs()[0].name, x.numpy()
    return lambda: torch.from_numpy(session.run(None, {name: array})[0])


def openvino(path, x):
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.compile_model(path, "CPU", options).create_infer_request()
    array = x.numpy()
    return lambda: torch.from_numpy(request.infer({0: array})[0])


PEERS = {"ONNX Runtime": onnx_runtime, "OpenVINO": openvino}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("batch", "seqlen"), SIZES)
def test_encoder(compare, encoder, peer, batch, seqlen, tmp_path):
    d_model = encoder.layers[0].linear1.in_features
    x = torch.randn(batch, seqlen, d_model)
    ours = copy.deepcopy(encoder)
    fastattn.replace(ours)
    fast_path = torch.backends.mha.get_fastpath_enabled()

    def run(model):
        def call():
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                with torch.inference_mode():
                    return model(x)
            finally:
                torch.backends.mha.set_fastpath_enabled(fast_path)

        return call

    candidates = {
        peer: PEERS[peer](exported(encoder, x, tmp_path), x),
        "torch eager": run(encoder),
        "fastattn": run(ours),
    }
    flops = len(encoder.layers) * (24 * batch * seqlen * d_model**2 + 4 * batch * seqlen**2 * d_model)
    compare(candidates, tolerance=1e-3, flops=flops)
