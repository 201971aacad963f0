"""Attention under `replace`: modules that call torch's scaled_dot_product_attention, and models of transformers."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from oracle import BACKWARD, assert_accurate
from replaced_cases import run

import fastattn
from fastattn.ops import _backends

D, HEADS = 24, 3


class SelfAttention(torch.nn.Module):
    """Attention of a small GPT: one product for q, k and v, then torch's function."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.qkv, self.out, self.dropout = torch.nn.Linear(D, 3 * D), torch.nn.Linear(D, D), dropout

    def forward(self, x, *, causal=True):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(2))


class InAMethod(SelfAttention):
    def mix(self, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(self.mix(q, k, v).transpose(1, 2).flatten(2))


class WrittenOutAttention(SelfAttention):
    def mix(self, q, k, v):
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


@pytest.fixture
def calls(monkeypatch):
    """The names of the ops for which a backend was chosen."""
    found = []
    choose = _backends.choose

    def counted(op, *args, **kwargs):
        found.append(op)
        return choose(op, *args, **kwargs)

    module = sys.modules["fastattn.ops.scaled_dot_product_attention"]
    for name in ("choose",):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, counted)
    monkeypatch.setattr(sys.modules["fastattn.ops.attention"], "choose", counted)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [SelfAttention, InAMethod])
def test_results_and_gradients(kind, dtype, calls):
    module, x = kind().to(dtype), torch.randn(2, 9, D, dtype=dtype)
    exact, exact_grads = run(copy.deepcopy(module).double(), x.double())
    before, grads = run(module, x)
    assert not calls
    report = fastattn.replace(torch.nn.Sequential(module), only="attention")
    assert report.replaced == {"0": f"attention (was {kind.__name__}'s call of torch's)"}
    ours, our_grads = run(module, x)
    assert calls
    assert_accurate(ours, exact, before)
    for name, grad in our_grads.items():
        assert_accurate(grad, exact_grads[name], grads[name], BACKWARD, f"gradient of {name}")
    report.undo()
    assert type(module) is kind
    assert torch.equal(run(module, x)[0], before)


def test_other_modules_keep_torch_s_function(calls):
    ours, theirs = SelfAttention(), SelfAttention()
    fastattn.replace(ours)
    theirs(torch.randn(2, 9, D))
    assert not calls
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


def test_calls_that_cannot_be_served_go_to_torch(calls):
    module, x = SelfAttention().double(), torch.randn(2, 9, D, dtype=torch.float64)
    expected = module(x)
    fastattn.replace(module)
    assert torch.equal(module(x), expected)
    assert not calls


def test_copies_hooks_and_tools():
    module, x = SelfAttention(), torch.randn(2, 9, D)
    fired = []
    module.register_forward_pre_hook(lambda *args: fired.append(True))
    expected = module(x, causal=False)
    fastattn.replace(module)
    torch.testing.assert_close(module(x, causal=False), expected)
    module._forward_pre_hooks.clear()
    assert len(fired) == 2
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        torch.testing.assert_close(twin(x, causal=False), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x, causal=False), expected)
    torch.testing.assert_close(torch.jit.trace(module, (x,))(x), module(x))
    torch.testing.assert_close(module.forward(x, causal=False), expected)


def test_attention_that_is_written_out_is_named():
    report = fastattn.replace(torch.nn.Sequential(WrittenOutAttention()), only="attention")
    assert report.replaced == {"0": "attention (was WrittenOutAttention's call of torch's)"}  # its base class calls it

    class OwnAttention(torch.nn.Module):
        def forward(self, x):
            return (x @ x.mT).softmax(-1) @ x

    report = fastattn.replace(torch.nn.Sequential(OwnAttention(), torch.nn.MultiheadAttention(D, HEADS)))
    assert set(report.replaced) == {"1"}
    assert report.left["0"].startswith("OwnAttention computes attention itself")


def test_a_model_of_transformers_that_is_part_of_another(calls):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=D, intermediate_size=32, num_hidden_layers=1, num_attention_heads=HEADS,
        attn_implementation="eager",
    )  # fmt: skip
    bert = transformers.BertModel(config).eval()
    model = torch.nn.ModuleDict({"bert": bert, "head": torch.nn.Linear(D, 2)})
    ids = torch.randint(40, (2, 9))
    before = bert(ids).last_hidden_state
    report = fastattn.replace(model, only="attention")
    assert report.replaced == {"bert": "attention, attn_implementation='fastattn' (was 'eager')"}
    torch.testing.assert_close(bert(ids).last_hidden_state, before)
    assert calls
    assert "2 modules" not in str(report)
    assert fastattn.replace(model, only="attention").replaced == {}
    report.undo()
    assert bert.config._attn_implementation == "eager"
    assert torch.equal(bert(ids).last_hidden_state, before)


def test_models_of_transformers_that_are_left_alone():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 40, "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": HEADS}
    deberta = transformers.DebertaV2Model(transformers.DebertaV2Config(**sizes, intermediate_size=32))
    report = fastattn.replace(deberta)
    assert report.left == {"": "DebertaV2Model has its own attention code, which attn_implementation does not replace"}
    assert deberta.config._attn_implementation == "eager"
    config = transformers.BertConfig(**sizes, intermediate_size=32, attn_implementation="eager", output_attentions=True)
    bert = transformers.BertModel(config)
    assert "output_attentions is set" in fastattn.replace(bert).left[""]
    with torch.device("meta"):
        meta = transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=32))
    report = fastattn.replace(meta)
    assert report.replaced == {}
    assert set(report.left.values()) == {"its parameters are on the meta device: load the weights first"}
    falcon = transformers.FalconModel(transformers.FalconConfig(**sizes, attn_implementation="sdpa"))
    report = fastattn.replace(falcon, only="attention")
    assert set(report.replaced) == {"h.0.self_attention"}


def test_replace_imports_no_transformers():
    code = (
        "import sys, torch, fastattn; print(fastattn.replace(torch.nn.Sequential(torch.nn.LayerNorm(8))));"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
