"""The switches of the model: both kinds of layers agree, caches and packing change nothing, known shapes train."""

import dataclasses
from pathlib import Path

import pytest
import torch
from model_cases import LAYERS, assert_both_layers_agree, build, random_tokens
from training_cases import TEXT, numbers

from fastattn.cli import main
from fastattn.models import CausalLM, KeyValueCache, MaskedLM, Seq2Seq
from fastattn.models.rotary import RotaryConfig, scaled_frequencies
from fastattn.models.shape import Shape
from fastattn.training.config import ModelConfig

ROTARY = {"positions": "rotary", "bias": False}
OPTIONS = {
    "rms": {"norm": "rms"},
    "rms without weights, post-norm": {"norm": "rms", "norm_weight": False, "norm_first": False},
    "layer norm without weights": {"norm_weight": False, "bias": False},
    "qk_norm of heads": {"qk_norm": "head", "norm": "rms", "n_kv_head": 2},
    "qk_norm of all, layer norm": {"qk_norm": "all", "n_kv_head": 2, "bias": False},
    "head_dim": {"head_dim": 12, "n_kv_head": 2},
    "qkv_bias": {"qkv_bias": True, "bias": False},
    "window": {"window": 3},
    "window, local base": {
        "window": 4, "window_pattern": "SL", "rotary": RotaryConfig(50.0, 10.0, "linear", 2.0), **ROTARY
    },
    "window, alibi": {"window": 5, "positions": "alibi"},
    "softcap": {"attention_softcap": 0.2, "logit_softcap": 0.5},
    "scale": {"attention_scale": 0.9, "n_kv_head": 1},
    "sinks": {"sinks": True},
    "sinks, window, softcap": {"sinks": True, "window": 4, "attention_softcap": 0.3, **ROTARY},
    "norm_output, pre-norm": {"norm_output": True, "norm": "rms"},
    "norm_output alone": {"norm_output": True, "norm_first": False, "norm": "rms"},
    "parallel": {"parallel": True},
    "embedding": {"embedding_scale": True, "embedding_norm": True, "norm": "rms"},
    "relu2": {"feed_forward": "relu2"},
    "geglu_tanh": {"feed_forward": "geglu_tanh", "bias": False},
    "llama3": {"rotary": RotaryConfig(100.0, None, "llama3", 4.0, 12, 1.0, 4.0), **ROTARY},
    "yarn": {"rotary": RotaryConfig(100.0, None, "yarn", 4.0, 8, 1.0, 32.0), **ROTARY},
}  # fmt: skip
RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "shapes").glob("*.yaml"))
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make(layers, options, kind=CausalLM):
    """A model in which the values that begin as 0 or 1 are random."""
    model = build(kind, layers, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@options
def test_both_layers_agree(options):
    tokens, targets = random_tokens(3, 16), random_tokens(3, 16, seed=2)
    targets[1, 5:] = -100
    assert_both_layers_agree(
        lambda layers: make(layers, options),
        lambda model, with_targets: model(tokens, targets if with_targets else None),
    )


@options
@pytest.mark.parametrize("layers", LAYERS)
def test_the_future_is_hidden_and_cache_and_packing_change_nothing(layers, options):
    model, tokens = make(layers, options).eval(), random_tokens(2, 16)
    with torch.no_grad():
        whole = model(tokens)
        torch.testing.assert_close(model(tokens[:, :9]), whole[:, :9], rtol=1e-4, atol=1e-5)
        cache = KeyValueCache(model, 2)
        parts = [model(part, cache=cache) for part in tokens.split([7, 1, 8], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
        ends = torch.tensor([0, 5, 16, 32], dtype=torch.int32)
        packed = model(tokens, cu_seqlens=ends).flatten(0, 1)
        for start, end in zip(ends.tolist(), ends.tolist()[1:], strict=False):
            alone = model(tokens.flatten()[None, start:end])[0]
            torch.testing.assert_close(packed[start:end], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["rms", "window", "window, alibi", "sinks, window, softcap", "norm_output alone"])
def test_encoders_do_not_see_padding(name):
    options, tokens, lengths = OPTIONS[name], random_tokens(2, 12), torch.tensor([7, 12])
    models = [make(layers, options, MaskedLM).eval() for layers in LAYERS]
    with torch.no_grad():
        theirs, ours = (model(tokens, lengths) for model in models)
        torch.testing.assert_close(ours[0, :7], theirs[0, :7], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-5)
        alone = models[1](tokens[:1, :7], lengths[:1])
        torch.testing.assert_close(ours[:1, :7], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["rms", "softcap", "qk_norm of heads", "norm_output, pre-norm", "sinks", "head_dim"])
def test_translators_search_alike_with_and_without_a_cache(name):
    source, lengths = random_tokens(2, 9), torch.tensor([9, 6])
    written = []
    for layers in LAYERS:
        model = make(layers, OPTIONS[name], Seq2Seq).eval()
        for use_cache in (True, False):
            how = {"begin": 2, "end": 3, "max_new_tokens": 8, "use_cache": use_cache}
            written.append(model.generate(source, lengths, **how))
    assert written[0] == written[1] == written[2] == written[3]


def test_a_window_hides_what_lies_before_it():
    model = make("fastattn", {"window": 3, "n_layer": 1}).eval()
    tokens = random_tokens(1, 16)
    changed = tokens.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 20
    differs = (model(tokens) - model(changed)).abs().amax(-1)[0] > 0
    assert differs.nonzero()[:, 0].tolist() == [4, 5, 6]


def test_scaled_frequencies_lie_between_the_original_and_the_divided_ones():
    plain = scaled_frequencies(64, RotaryConfig())[0]
    assert torch.equal(scaled_frequencies(64, RotaryConfig(scaling="linear", factor=4.0))[0], plain / 4)
    for scaling, high in (("llama3", 4.0), ("yarn", 32.0)):
        config = RotaryConfig(scaling=scaling, factor=4.0, original_length=256, high_frequency=high)
        scaled = scaled_frequencies(64, config)[0]
        assert (scaled <= plain * (1 + 1e-12)).all()
        assert (scaled >= plain / 4 * (1 - 1e-12)).all()
        torch.testing.assert_close(scaled[[0, -1]], plain[[0, -1]] / torch.tensor([1, 4]))


def test_the_config_has_every_field_of_the_shape_with_the_same_default():
    config = {f.name: f for f in dataclasses.fields(ModelConfig)}
    for f in dataclasses.fields(Shape):
        if f.name not in ("layers", "n_layer", "n_head", "d_model", "block_size"):
            ours = [
                x.default if x.default_factory is dataclasses.MISSING else x.default_factory()
                for x in (config[f.name], f)
            ]
            assert ours[0] == ours[1], f.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be None or at least 1, got 0"),
        ({"window_pattern": "SX"}, "window_pattern must consist of the letters S and L, got 'SX'"),
        ({"window_pattern": ""}, "window_pattern must consist of"),
        ({"logit_softcap": -1.0}, "logit_softcap must be 0 or a finite number above it, got -1.0"),
        ({"attention_scale": 0.0}, "attention_scale must be None or a finite number above 0"),
        ({"parallel": True, "norm_first": False}, "parallel must be False unless norm_first"),
        ({"norm": "batch"}, "norm must be 'layer' or 'rms', got 'batch'"),
        ({"head_dim": 0}, "head_dim must be None or at least 1, got 0"),
    ],
)
def test_bad_switches_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(CausalLM, **options)


def test_bad_switches_are_one_line_on_the_command_line(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    for option, message in (
        ("--model.window=0", "model.window must be None or at least 1, got 0"),
        ("--model.rotary.scaling=ntk", "rotary.scaling must be one of"),
        ("--model.rotary.base=-1", "rotary.base must be a finite number above 0, got -1.0"),
    ):
        assert main(["train", "--data.source", str(tmp_path / "text.txt"), "--run", str(tmp_path / "run"), option]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_shapes_of_known_models_train(recipe, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    small = {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "d_model": 16, "d_ff": 24, "head_dim": 8, "block_size": 16}
    if "window" in recipe.read_text():
        small["window"] = 4
    arguments = ["--data.source", tmp_path / "text.txt", "--data.tokenizer", "char", "--run", tmp_path / "run"]
    arguments += ["--tensorboard", "false", "--steps", 12, "--evaluate_every", 12, "--log_every", 1, "--batch_size", 4]
    arguments += ["--optim.warmup_steps", 2, "--optim.learning_rate", 1e-2, "--sample_tokens", 5]
    arguments += [a for name, value in small.items() for a in (f"--model.{name}", value)]
    assert main(["train", "--config", str(recipe), *map(str, arguments)]) == 0
    losses = numbers(tmp_path / "run")
    assert losses[-1] < losses[0] - 0.2
    assert main(["evaluate", str(tmp_path / "run"), "--attention", "green bottles"]) == 0
