"""Transformer layers, inference and training step: eager torch.nn, its fast path, torch.compile, fastattn."""

import copy

import pytest
import torch
from conftest import DEVICE

import fastattn.nn

# d_model, n_heads, batch, seqlen; d_ff = 4 d_model
SIZES = [(128, 4, 16, 64), (256, 4, 32, 32), (512, 8, 8, 128)] if DEVICE == "cpu" else [(1024, 16, 16, 1024)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 8e-2}


def layer_flops(d_model, batch, seqlen):
    """FLOPs of the forward: four projections, the feed-forward of width 4 d_model, and two products of attention."""
    return 2 * batch * seqlen * d_model * (4 * d_model + 8 * d_model) + 4 * batch * seqlen**2 * d_model


def decoder_flops(d_model, batch, seqlen):
    """The same for a decoder layer with a memory as long as its input: four projections and two products more."""
    tokens = batch * seqlen
    return layer_flops(d_model, batch, seqlen) + 2 * tokens * d_model * 4 * d_model + 4 * tokens * seqlen * d_model


def layers(d_model, n_heads, dropout, dtype, kind="Encoder"):
    """The same encoder or decoder layer from torch.nn and from fastattn.nn."""
    torch.manual_seed(0)
    args = (d_model, n_heads, 4 * d_model, dropout, "gelu")
    reference, ours = (
        getattr(library, f"Transformer{kind}Layer")(*args, batch_first=True, device=DEVICE, dtype=dtype)
        for library in (torch.nn, fastattn.nn)
    )
    ours.load_state_dict(reference.state_dict())
    return reference, ours


def training_step(layer, forward):
    """Forward, backward and an AdamW update of a layer; forward is the layer, compiled or not, of its inputs."""
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-4, fused=True)

    def call():
        forward(layer).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def gradients(layer, forward):
    """The loss and the gradients of all parameters, without dropout."""
    layer = without_dropout(layer).train()

    def call():
        loss = forward(layer).float().square().mean()
        return loss, *torch.autograd.grad(loss, list(layer.parameters()))

    return call


def without_dropout(layer):
    layer = copy.deepcopy(layer)
    for module in layer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    return layer


@pytest.fixture
def no_fast_path():
    """Switch torch.nn's inference fast path off, and on again afterwards."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    yield lambda on: torch.backends.mha.set_fastpath_enabled(on)
    torch.backends.mha.set_fastpath_enabled(enabled)


@pytest.mark.parametrize(("d_model", "n_heads", "batch", "seqlen"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_inference(compare, no_fast_path, dtype, d_model, n_heads, batch, seqlen):
    reference, ours = (layer.eval() for layer in layers(d_model, n_heads, 0.1, dtype))
    x = torch.randn(batch, seqlen, d_model, dtype=dtype, device=DEVICE)
    compiled = torch.compile(copy.deepcopy(reference))

    def run(layer, fast_path):
        def call():
            no_fast_path(fast_path)
            with torch.inference_mode():
                return layer(x)

        return call

    candidates = {
        "torch eager": run(reference, False),
        "torch fast path": run(reference, True),
        "torch.compile": run(compiled, False),
        "fastattn": run(ours, False),
    }
    compare(candidates, tolerance=TOLERANCE[dtype], flops=layer_flops(d_model, batch, seqlen), dtype=dtype)


@pytest.mark.parametrize(("d_model", "n_heads", "batch", "seqlen"), SIZES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_training_step(compare, dtype, dropout, d_model, n_heads, batch, seqlen):
    """Forward, backward and an AdamW update of one layer."""
    reference, ours = layers(d_model, n_heads, dropout, dtype)
    x = torch.randn(batch, seqlen, d_model, dtype=dtype, device=DEVICE)

    def step(layer, compile=False):
        layer = copy.deepcopy(layer).train()
        compiled = torch.compile(layer) if compile else layer
        return training_step(layer, lambda _: compiled(x))

    compare(
        {"torch eager": step(reference), "torch.compile": step(reference, compile=True), "fastattn": step(ours)},
        verify={name: gradients(layer, lambda layer: layer(x)) for name, layer in named(reference, ours)},
        tolerance=TOLERANCE[dtype],
        flops=3 * layer_flops(d_model, batch, seqlen),
        dtype=dtype,
    )


def named(reference, ours):
    return ("torch eager", reference), ("fastattn", ours)


def decoded(d_model, batch, seqlen, dtype):
    """A function of a decoder layer: its output for an input with a causal mask and a memory of the same length."""
    x, memory = torch.randn(2, batch, seqlen, d_model, dtype=dtype, device=DEVICE)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(seqlen, DEVICE, dtype)
    return lambda layer: layer(x, memory, tgt_mask=mask, tgt_is_causal=True)


@pytest.mark.parametrize(("d_model", "n_heads", "batch", "seqlen"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_decoder_inference(compare, dtype, d_model, n_heads, batch, seqlen):
    forward = decoded(d_model, batch, seqlen, dtype)

    def run(layer):
        def call():
            with torch.inference_mode():
                return forward(layer.eval())

        return call

    candidates = {name: run(layer) for name, layer in named(*layers(d_model, n_heads, 0.1, dtype, "Decoder"))}
    compare(candidates, tolerance=TOLERANCE[dtype], flops=decoder_flops(d_model, batch, seqlen), dtype=dtype)


@pytest.mark.parametrize(("d_model", "n_heads", "batch", "seqlen"), SIZES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_decoder_training_step(compare, dtype, dropout, d_model, n_heads, batch, seqlen):
    """Forward, backward and an AdamW update of one decoder layer."""
    forward = decoded(d_model, batch, seqlen, dtype)
    pairs = named(*layers(d_model, n_heads, dropout, dtype, "Decoder"))
    compare(
        {name: training_step(layer.train(), forward) for name, layer in pairs},
        verify={name: gradients(layer, forward) for name, layer in pairs},
        tolerance=TOLERANCE[dtype],
        flops=3 * decoder_flops(d_model, batch, seqlen),
        dtype=dtype,
    )
