"""Shared by the tests of all models: shapes, options, and the comparison of the two kinds of layers."""

import torch

LAYERS = ("torch", "fastattn")
VOCAB = 20
SHAPE = {"n_layer": 2, "n_head": 4, "d_model": 32, "block_size": 16}
# every value of every option that changes the computation, alone or combined as in well-known models
OPTIONS = {
    "default": {},
    "untied": {"tied": False},
    "post-norm": {"norm_first": False},
    "d_ff": {"d_ff": 40, "feed_forward": "relu"},
    "sinusoidal": {"positions": "sinusoidal"},
    "rotary": {"positions": "rotary"},
    "alibi": {"positions": "alibi"},
    "alibi, 3 heads": {"positions": "alibi", "n_head": 3, "d_model": 24},
    "GQA": {"n_kv_head": 2},
    "MQA, post-norm, rotary": {"n_kv_head": 1, "norm_first": False, "positions": "rotary"},
    "gelu_tanh": {"feed_forward": "gelu_tanh"},
    "silu, post-norm": {"feed_forward": "silu", "norm_first": False},
    "geglu": {"feed_forward": "geglu"},
    "reglu, no bias": {"feed_forward": "reglu", "bias": False},
    "Llama": {"positions": "rotary", "n_kv_head": 2, "feed_forward": "swiglu", "bias": False, "d_ff": 48},
    "eps": {"norm_eps": 0.1},
    "eps, post-norm, silu": {"norm_eps": 0.1, "norm_first": False, "feed_forward": "silu"},
    "smoothed": {"label_smoothing": 0.1},
}


def build(model, layers="fastattn", *sizes, seed=0, **changes):
    torch.manual_seed(seed)
    return model(VOCAB, *sizes, layers=layers, **{**SHAPE, **changes})


def random_tokens(*shape, seed=1):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model, loss):
    """{name: gradient}, after a backward."""
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_both_layers_agree(make, run):
    """Check that initial weights are equal bit for bit, and loss, logits and every gradient up to rounding.

    Args:
        make: layers → model.
        run: (model, whether with targets) → loss or logits.
    """
    theirs, ours = (make(layers) for layers in LAYERS)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    assert theirs.num_parameters() == ours.num_parameters()
    torch.testing.assert_close(run(ours, False), run(theirs, False), rtol=1e-5, atol=1e-5)
    losses = [run(model, True) for model in (theirs, ours)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    expected, actual = (gradients(model, loss) for model, loss in zip((theirs, ours), losses, strict=True))
    for name, value in expected.items():
        scale = value.abs().max().item()
        assert scale > 0 or "bias" in name, name  # a bias of keys has no gradient: softmax does not depend on it
        torch.testing.assert_close(
            actual[name], value, rtol=1e-4, atol=1e-5 * scale + 1e-8, msg=lambda m, name=name: f"{name}: {m}"
        )
