"""`generate` after `replace` with the caches that transformers has beside the usual ones: the same tokens.

Offloaded caches need a GPU, whose streams order the copies. Here stand-ins for them do nothing, so the caches run on
the CPU, and every copy happens at once. tests/drop_in/test_replace_families.py has the other caches.
"""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
import transformers
from transformers_families import VERSION, inputs_of, model_of

import fastattn


class NoStream:
    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def wait_stream(self, other):
        pass


@pytest.fixture
def streams(monkeypatch):
    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", NoStream)


def fp8(model):
    layer = getattr(transformers.cache_utils, "Fp8QuantizedLayer", None)
    if layer is None:
        pytest.skip("this version of transformers quantises no cache without another package")
    return {"past_key_values": transformers.Cache(layers=[layer() for _ in range(model.config.num_hidden_layers)])}


CACHES = {
    "offloaded": lambda model: {"cache_implementation": "offloaded"},
    "offloaded, static": lambda model: {"cache_implementation": "offloaded_static"},
    "offloaded, of its own": lambda model: {
        "past_key_values": transformers.DynamicCache(config=model.config, offloading=True)
    },
    "eight bits": fp8,
}


def eager(family, **changes):
    model = copy.deepcopy(model_of(family)).eval()
    if changes:
        config = copy.deepcopy(model.config)
        config.update(changes)
        torch.manual_seed(0)
        model = type(model)(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.15 * torch.randn_like(parameter)
    model.set_attn_implementation("eager")
    return model


def tokens_of(model, cache, padding="left", **options):
    given, _ = inputs_of("decoder", padding, seqlen=14)
    return model.generate(**given, max_new_tokens=10, do_sample=False, **CACHES[cache](model), **options)


@pytest.mark.parametrize("cache", [cache for cache in CACHES if cache != "eight bits"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt_oss", "qwen3", "gpt2", "bart"])
@pytest.mark.skipif(VERSION < (5, 0), reason="older versions of transformers spell these caches differently")
def test_offloaded_caches(family, cache, streams):
    if (family, cache) == ("mistral", "offloaded, static"):
        pytest.skip("transformers looks for a layer without a window there and finds none")
    if (family, cache) == ("bart", "offloaded, of its own"):
        pytest.skip("transformers makes the pair of caches of an encoder-decoder itself")
    model, padding = eager(family), "right" if family == "bart" else "left"
    cases = [{}] if cache == "offloaded, static" else [{}, {"num_beams": 3}]
    expected = [tokens_of(model, cache, padding, **case) for case in cases]
    assert expected[0][:, -10:].unique().numel() > 1
    fastattn.replace(model)
    for case, before in zip(cases, expected, strict=True):
        assert torch.equal(tokens_of(model, cache, padding, **case), before)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_cache_in_eight_bits(family):
    """In one layer, whose keys and values keep their bits: a value that rounds to another of 256 changes tokens."""
    model = eager(family, **({"n_layer": 1} if family == "gpt2" else {"num_hidden_layers": 1}))
    expected = [tokens_of(model, "eight bits"), tokens_of(model, "eight bits", num_beams=3)]
    assert expected[0][:, -10:].unique().numel() > 1
    fastattn.replace(model, only=("attention", "loss"))
    assert torch.equal(tokens_of(model, "eight bits"), expected[0])
    assert torch.equal(tokens_of(model, "eight bits", num_beams=3), expected[1])
