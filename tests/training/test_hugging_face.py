"""BERT and GPT-2 folders: the logits of transformers and of the formulas; nothing is downloaded."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("safetensors", reason="needs the packages of fastattn[train]")
import torch
import torch.nn.functional as F
from made_up_models import make_up
from safetensors.torch import load_file, save_file

from fastattn.integrations.hugging_face import load_hugging_face, read_config
from fastattn.models import CausalLM, Classifier, MaskedLM
from fastattn.models.backbone import Backbone

LENGTHS = torch.tensor([11, 16, 2])
VALID = torch.arange(16) < LENGTHS[:, None]
SHAPES = {
    "Bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
             "max_position_embeddings": 16, "vocab_size": 40},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": 40, "bos_token_id": 1,
             "eos_token_id": 1},
}  # fmt: skip


def save_model(transformers, name, folder, **changes):
    """A model of transformers with larger random weights than its own initialisation, and its folder."""
    family = "Bert" if name.startswith("Bert") else "GPT2"
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**{**SHAPES[family], **changes}))
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    model.eval().save_pretrained(folder)
    return model


def tokens():
    return torch.randint(40, (3, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layers", ["torch", "fastattn"])
@pytest.mark.parametrize(
    ("name", "changes", "kind"),
    [
        ("BertModel", {}, Backbone),
        ("BertForMaskedLM", {}, MaskedLM),
        ("BertForMaskedLM", {"tie_word_embeddings": False}, MaskedLM),
        ("BertForPreTraining", {"layer_norm_eps": 0.1}, MaskedLM),
        ("BertForSequenceClassification", {"num_labels": 3, "hidden_act": "gelu_new"}, Classifier),
        ("GPT2Model", {}, CausalLM),
        ("GPT2LMHeadModel", {}, CausalLM),
        ("GPT2LMHeadModel", {"tie_word_embeddings": False, "n_inner": 40, "layer_norm_epsilon": 0.1}, CausalLM),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) if isinstance(value, dict) else "",
)
@torch.no_grad()
def test_logits_are_those_of_transformers(transformers, tmp_path, name, changes, kind, layers):
    theirs, x = save_model(transformers, name, tmp_path, **changes), tokens()
    ours = load_hugging_face(tmp_path, layers=layers)
    assert type(ours) is kind
    if kind is CausalLM:
        if name == "GPT2Model":
            expected, logits = theirs(x).last_hidden_state, Backbone.forward(ours, x, causal=True)
        else:
            expected, logits = theirs(x).logits, ours(x)
    else:
        out = theirs(x, attention_mask=VALID.long())
        if kind is Backbone:
            expected, logits = out.last_hidden_state[VALID], ours(x, lengths=LENGTHS)[VALID]
        elif kind is Classifier:
            expected, logits = out.logits, ours(x, LENGTHS)
        else:
            expected = (out.prediction_logits if name == "BertForPreTraining" else out.logits)[VALID]
            logits = ours(x, LENGTHS)[VALID]
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_older_files_hold_the_same(transformers, tmp_path):
    """pytorch_model.bin, gamma and beta as names of norm weights, saved buffers, no prefix."""
    for name in ("BertForMaskedLM", "GPT2LMHeadModel"):
        new, old = tmp_path / name, tmp_path / f"old {name}"
        save_model(transformers, name, new)
        old.mkdir()
        shutil.copy(new / "config.json", old)
        values = {}
        for key, value in load_file(new / "model.safetensors").items():
            if "LayerNorm" in key:
                key = key.replace(".weight", ".gamma").replace(".bias", ".beta")
            values[key.removeprefix("transformer.")] = value
        if name == "BertForMaskedLM":
            values["bert.embeddings.position_ids"] = torch.arange(16)[None]
            values["cls.predictions.decoder.weight"] = values["bert.embeddings.word_embeddings.weight"]
            values["cls.predictions.decoder.bias"] = values["cls.predictions.bias"]
        else:
            values["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
            values["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        torch.save(values, old / "pytorch_model.bin")
        inputs = (tokens(),) if name == "GPT2LMHeadModel" else (tokens(), LENGTHS)
        assert torch.equal(load_hugging_face(old)(*inputs), load_hugging_face(new)(*inputs))


def layer_norm(t, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)


def linear(t, name, x):
    return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]


def attend(q, k, v, causal=False, n_head=2):
    """Scaled dot-product attention with the softmax written out; (batch, seqlen, d)."""
    q, k, v = (y.unflatten(-1, (n_head, -1)).transpose(1, 2) for y in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)


def bert(t, x):
    """States of the last layer (Devlin et al. 2019), from the tensors of a checkpoint."""
    t = {name.removeprefix("bert."): value for name, value in t.items()}
    h = t["embeddings.word_embeddings.weight"][x] + t["embeddings.token_type_embeddings.weight"][0]
    h = layer_norm(t, "embeddings.LayerNorm", h + t["embeddings.position_embeddings.weight"][: x.shape[1]], 1e-12)
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        q, k, v = (linear(t, f"{layer}.attention.self.{part}", h) for part in ("query", "key", "value"))
        a = linear(t, f"{layer}.attention.output.dense", attend(q, k, v))
        h = layer_norm(t, f"{layer}.attention.output.LayerNorm", h + a, 1e-12)
        a = linear(t, f"{layer}.output.dense", F.gelu(linear(t, f"{layer}.intermediate.dense", h)))
        h = layer_norm(t, f"{layer}.output.LayerNorm", h + a, 1e-12)
    return h


def gpt2(t, x):
    """Logits (Radford et al. 2019), from the tensors of a checkpoint, whose matrices are (columns, rows)."""
    t = {name.removeprefix("transformer."): value for name, value in t.items()}
    h = t["wte.weight"][x] + t["wpe.weight"][: x.shape[1]]
    for block in ("h.0", "h.1"):

        def conv1d(name, x, block=block):
            return x @ t[f"{block}.{name}.weight"] + t[f"{block}.{name}.bias"]

        a = attend(*conv1d("attn.c_attn", layer_norm(t, f"{block}.ln_1", h, 1e-5)).chunk(3, -1), causal=True)
        h = h + conv1d("attn.c_proj", a)
        a = F.gelu(conv1d("mlp.c_fc", layer_norm(t, f"{block}.ln_2", h, 1e-5)), approximate="tanh")
        h = h + conv1d("mlp.c_proj", a)
    return layer_norm(t, "ln_f", h, 1e-5) @ t["wte.weight"].T


@pytest.mark.parametrize("layers", ["torch", "fastattn"])
@torch.no_grad()
def test_logits_are_those_of_the_formulas(tmp_path, layers):
    """Without transformers: the logits computed from the tensors by the formulas of the papers."""
    x, lengths = tokens(), torch.full((3,), 16)
    t = make_up(tmp_path / "mlm", "bert")
    head = "cls.predictions.transform"
    y = layer_norm(t, f"{head}.LayerNorm", F.gelu(linear(t, f"{head}.dense", bert(t, x))), 1e-12)
    expected = y @ t["bert.embeddings.word_embeddings.weight"].T + t["cls.predictions.bias"]
    logits = load_hugging_face(tmp_path / "mlm", layers=layers)(x, lengths)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    t = make_up(tmp_path / "classes", "bert", n_classes=3)
    expected = linear(t, "classifier", linear(t, "bert.pooler.dense", bert(t, x)[:, 0]).tanh())
    logits = load_hugging_face(tmp_path / "classes", layers=layers)(x, lengths)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    t = make_up(tmp_path / "body", "bert", head=False)
    states = load_hugging_face(tmp_path / "body", layers=layers)(x, lengths=lengths)
    torch.testing.assert_close(states, bert(t, x), rtol=1e-4, atol=1e-4)
    t = make_up(tmp_path / "gpt2", "gpt2")
    logits = load_hugging_face(tmp_path / "gpt2", layers=layers)(x)
    torch.testing.assert_close(logits, gpt2(t, x), rtol=1e-4, atol=1e-4)


def test_first_token_type_is_in_the_positions(tmp_path):
    tensors = make_up(tmp_path, "bert")
    x = load_hugging_face(tmp_path).encoder.position_embedding.weight[5]
    expected = (
        tensors["bert.embeddings.position_embeddings.weight"][5]
        + tensors["bert.embeddings.token_type_embeddings.weight"][0]
    )
    assert torch.equal(x, expected)


def test_what_a_folder_holds(tmp_path):
    for name, kind, options, task, labels, pooling in (
        ("mlm", "bert", {}, "masked_lm", None, "pooler"),
        ("body", "bert", {"head": False}, "masked_lm", None, "pooler"),
        ("classes", "bert", {"n_classes": 2}, "classify", ["class 0", "class 1"], "pooler"),
        ("gpt2", "gpt2", {}, "lm", None, "mean"),
    ):
        make_up(tmp_path / name, kind, **options)
        found = read_config(tmp_path / name)
        assert found[:2] == (task, labels)
        assert found[2]["pooling"] == pooling
        assert found[2]["head_transform"] == (name == "mlm")
        assert found[2]["norm_eps"] == (1e-5 if kind == "gpt2" else 1e-12)


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("bert", {"model_type": "t5"}, "model_type must be one of llama, .*bert, got 't5'"),
        ("bert", {"is_decoder": True}, "is_decoder must be False, got True"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute'"),
        ("bert", {"hidden_act": "mish"}, "the activation must be one of gelu, .*, got 'mish'"),
        ("bert", {"hidden_act": "relu"}, "hidden_act must be 'gelu' with a masked language model's head, got 'relu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be False, got True"),
        ("gpt2", {"n_embd": None}, "config.json has no n_embd"),
        ("gpt2", "config.json", "config.json is not a readable config of a Hugging Face model: FileNotFoundError"),
        ("gpt2", "model.safetensors", "has neither model.safetensors nor pytorch_model.bin"),
        ("gpt2", {"tensor": "transformer.h.0.adapter.weight"}, "the tensor transformer.h.0.adapter.weight is not part"),
    ],
)
def test_folders_that_are_refused(tmp_path, kind, changes, expected):
    tensors = make_up(tmp_path, kind)
    if isinstance(changes, str):
        (tmp_path / changes).unlink()
    elif "tensor" in changes:
        save_file({**tensors, changes["tensor"]: torch.zeros(2)}, tmp_path / "model.safetensors")
    else:
        config = {**json.loads((tmp_path / "config.json").read_text()), **changes}
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(ValueError, match=expected):
        load_hugging_face(tmp_path)


def test_a_damaged_file_and_code_in_a_file_are_refused(tmp_path):
    make_up(tmp_path, "gpt2")
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"model.safetensors has no readable weights: "):
        load_hugging_face(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"x": Path("x")}, tmp_path / "pytorch_model.bin")  # unpickling would call what the file names
    with pytest.raises(ValueError, match=r"pytorch_model.bin has no readable weights: UnpicklingError"):
        load_hugging_face(tmp_path)
