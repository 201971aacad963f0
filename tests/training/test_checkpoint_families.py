"""Folders of Hugging Face, in and out: equal logits for every family, shards, refusals; nothing is downloaded."""

import json

import pytest

pytest.importorskip("safetensors", reason="needs the packages of fastattn[train]")
import torch

from fastattn.integrations.hugging_face import load_hugging_face, read_config, write_hugging_face
from fastattn.models import CausalLM

SMALL = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
BOTH = {
    "full_attention": {**LINEAR, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
FAMILIES = {
    "Llama": {},
    "Llama, scaled and tied": {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 12},
    "Mistral": {"sliding_window": 5, "head_dim": 8},
    "Mistral, no window": {"sliding_window": None, "rope_parameters": LINEAR},
    "Qwen2": {"rope_parameters": YARN},
    "Qwen2, windows": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "Qwen3": {"head_dim": 12, "tie_word_embeddings": True},
    "Gemma": {"head_dim": 12, "num_key_value_heads": 1},
    "Gemma2": {"head_dim": 12, "query_pre_attn_scalar": 16, "sliding_window": 4, "attn_logit_softcapping": 2.0,
               "final_logit_softcapping": 3.0},
    "Gemma3": {"head_dim": 8, "query_pre_attn_scalar": 16, "sliding_window": 4, "rope_parameters": BOTH,
               "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "Olmo": {"num_key_value_heads": 4},
    "Olmo2": {"num_key_value_heads": 4},
    "NanoChat": {"num_key_value_heads": 4},
}  # fmt: skip


def their_model(transformers, name, folder=None, **changes):
    """A tiny model with larger random weights than its own initialisation; saved if there is a folder."""
    family = name.partition(",")[0]
    config = getattr(transformers, f"{family}{'Text' if family == 'Gemma3' else ''}Config")
    torch.manual_seed(0)
    config = config(**{**SMALL, **FAMILIES[name], **changes}, attn_implementation="eager")
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    if folder is not None:
        model.save_pretrained(folder)
    return model


def tokens():
    return torch.randint(40, (3, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_import_export_and_import_again_give_equal_logits(transformers, tmp_path, name):
    first, second, x = tmp_path / "first", tmp_path / "second", tokens()
    expected = their_model(transformers, name, first)(x).logits
    assert expected.std() > 0.3
    for layers in ("torch", "fastattn"):
        ours = load_hugging_face(first, layers=layers)
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)
    second.mkdir()
    kind = write_hugging_face(ours, second)
    again = transformers.AutoModelForCausalLM.from_pretrained(second, attn_implementation="eager")
    torch.testing.assert_close(again(x).logits, expected, rtol=1e-4, atol=1e-4)
    same = "Llama" if name == "Mistral, no window" else name.partition(",")[0]  # then it is the same model
    assert type(again.eval()).__name__ == f"{same}ForCausalLM"
    torch.testing.assert_close(load_hugging_face(second)(x), ours(x), rtol=1e-5, atol=1e-5)
    assert json.loads((second / "config.json").read_text())["model_type"] == kind


@torch.no_grad()
def test_shards_are_read_as_one(transformers, tmp_path):
    model, x = their_model(transformers, "Qwen3"), tokens()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    torch.testing.assert_close(load_hugging_face(tmp_path)(x), model(x).logits, rtol=1e-4, atol=1e-4)
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ValueError, match=f"has no {lost.name}, which model.safetensors.index.json names"):
        load_hugging_face(tmp_path)


def test_configs_of_transformers_4_mean_the_same(transformers, tmp_path):
    for name in ("Llama, scaled and tied", "Gemma3", "Qwen2, windows", "Gemma2"):
        folder = tmp_path / name
        their_model(transformers, name, folder)
        expected = read_config(folder)
        config = json.loads((folder / "config.json").read_text())
        rotary = config.pop("rope_parameters")
        if name == "Gemma3":
            config["rope_local_base_freq"] = rotary["sliding_attention"]["rope_theta"]
            rotary, config["sliding_window_pattern"] = rotary["full_attention"], 3
        config["rope_theta"] = rotary.pop("rope_theta")
        rotary["type"] = rotary.pop("rope_type")
        config["rope_scaling"] = None if rotary["type"] == "default" else rotary
        config.pop("layer_types", None)
        (folder / "config.json").write_text(json.dumps(config))
        assert read_config(folder) == expected, name


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Llama", {"mlp_bias": True}, "mlp_bias must be False, got True"),
        ("Llama", {"attention_bias": True}, "attention_bias must be False, got True"),
        ("Llama", {"hidden_act": "gelu"}, "the activation must be one of silu, swish, got 'gelu'"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "the rope_type must be one of"),
        ("Llama", {"model_type": "mamba"}, "model_type must be one of llama, .*, got 'mamba'"),
        ("Olmo", {"clip_qkv": 8.0}, "clip_qkv must be None, got 8.0"),
    ],
)
def test_what_ours_cannot_say_is_refused(transformers, tmp_path, name, changes, message):
    their_model(transformers, name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        load_hugging_face(tmp_path)


def test_a_shape_of_no_family_is_not_written(tmp_path):
    model = CausalLM(40, n_layer=1, n_head=2, d_model=8, block_size=8, positions="alibi")
    with pytest.raises(ValueError, match=r"no family of Hugging Face has this model: .*gpt2 differs in positions"):
        write_hugging_face(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_shorter_block_size_saves_caches(transformers, tmp_path):
    their_model(transformers, "Llama", tmp_path)
    assert load_hugging_face(tmp_path, block_size=4).block_size == 4
