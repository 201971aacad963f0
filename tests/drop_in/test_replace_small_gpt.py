"""`replace` on a small GPT as people write it themselves: everything in one file, and a forward that takes targets."""

import collections
import copy
import os
import runpy
import types

import pytest
import torch
import torch.nn.functional as F
from oracle import BACKWARD, assert_accurate
from processes import run_code

import fastattn

VOCAB, D, HEADS, SEQLEN = 40, 24, 3, 16


class LayerNormWithOptionalBias(torch.nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(D))
        self.bias = torch.nn.Parameter(torch.zeros(D)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=1e-5)


class CausalAttention(torch.nn.Module):
    def __init__(self, bias, p):
        super().__init__()
        self.to_qkv, self.to_out = torch.nn.Linear(D, 3 * D, bias=bias), torch.nn.Linear(D, D, bias=bias)
        self.p, self.after = p, torch.nn.Dropout(p)

    def forward(self, x):
        rows, seqlen, _ = x.shape
        q, k, v = (t.view(rows, seqlen, HEADS, -1).transpose(1, 2) for t in self.to_qkv(x).split(D, dim=2))
        p = self.p if self.training else 0
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=p, is_causal=True)
        return self.after(self.to_out(y.transpose(1, 2).reshape(rows, seqlen, D)))


class Mlp(torch.nn.Module):
    def __init__(self, bias, p):
        super().__init__()
        self.up, self.down = torch.nn.Linear(D, 4 * D, bias=bias), torch.nn.Linear(4 * D, D, bias=bias)
        self.gelu, self.after = torch.nn.GELU(), torch.nn.Dropout(p)

    def forward(self, x):
        return self.after(self.down(self.gelu(self.up(x))))


class Layer(torch.nn.Module):
    def __init__(self, bias, p):
        super().__init__()
        self.norm1, self.norm2 = LayerNormWithOptionalBias(bias), LayerNormWithOptionalBias(bias)
        self.attend, self.mlp = CausalAttention(bias, p), Mlp(bias, p)

    def forward(self, x):
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Gpt(torch.nn.Module):
    def __init__(self, bias=True, p=0.0):
        super().__init__()
        self.tokens, self.positions = torch.nn.Embedding(VOCAB, D), torch.nn.Embedding(SEQLEN, D)
        self.layers = torch.nn.ModuleList(Layer(bias, p) for _ in range(2))
        self.norm, self.head = LayerNormWithOptionalBias(bias), torch.nn.Linear(D, VOCAB, bias=False)
        self.tokens.weight = self.head.weight
        for parameter in self.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)

    def forward(self, tokens, targets=None):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        if targets is None:
            return self.head(x[:, [-1]]), None
        logits = self.head(x)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)

    @torch.no_grad()
    def generate(self, tokens, n):
        for _ in range(n):
            logits, _ = self(tokens[:, -SEQLEN:])
            tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        return tokens


TOKENS = torch.randint(VOCAB, (3, SEQLEN), generator=torch.Generator().manual_seed(0))
TARGETS = torch.where(TOKENS % 5 == 0, -1, TOKENS.roll(-1, 1))


def step(model):
    model.zero_grad()
    logits, loss = model(TOKENS, TARGETS)
    loss.backward()
    return logits, loss, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step(bias, dtype):
    model = Gpt(bias)
    _, exact, exact_grads = step(copy.deepcopy(model).double())
    model = model.to(dtype)
    logits, loss, grads = step(model)
    state = list(model.state_dict())
    report = fastattn.replace(model)
    assert report.left == {}
    linears = ("attend.to_qkv", "attend.to_out", "mlp.up", "mlp.down")
    assert {name: what.partition(" ")[0] for name, what in report.replaced.items()} == {
        **{f"layers.{i}.{name}": "Linear" for i in range(2) for name in linears},
        "layers.0.norm1": "LayerNorm", "layers.0.norm2": "LayerNorm", "layers.0.attend": "attention",
        "layers.1.norm1": "LayerNorm", "layers.1.norm2": "LayerNorm", "layers.1.attend": "attention",
        "norm": "LayerNorm", "head": "output",
    }  # fmt: skip
    assert list(model.state_dict()) == state
    our_logits, ours, our_grads = step(model)
    assert our_logits._made is None
    assert_accurate(ours, exact, loss, slack=torch.finfo(dtype).eps * exact.item())
    for name, grad in our_grads.items():
        assert_accurate(grad, exact_grads[name], grads[name], BACKWARD, f"gradient of {name}")
    torch.testing.assert_close(our_logits.float(), logits.float(), atol=20 * torch.finfo(dtype).eps, rtol=1e-2)
    report.undo()
    again = step(model)
    assert torch.equal(again[0], logits)
    assert all(torch.equal(again[2][name], grad) for name, grad in grads.items())


def test_generated_tokens():
    model = Gpt().eval()
    expected = model.generate(TOKENS[:, :4], 20)
    fastattn.replace(model)
    assert torch.equal(model.generate(TOKENS[:, :4], 20), expected)


def test_compiled():
    model = Gpt()
    _, loss, grads = step(model)
    fastattn.replace(model)
    torch._dynamo.reset()
    _, ours, our_grads = step(torch.compile(model, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(ours, loss)
    for name, grad in grads.items():
        torch.testing.assert_close(our_grads[f"_orig_mod.{name}"], grad, atol=1e-5, rtol=1e-4)


def test_it_learns_with_dropout():
    torch.manual_seed(0)
    model = Gpt(p=0.1)
    fastattn.replace(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        _, loss = model(TOKENS, TARGETS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


PARALLEL = """
import os
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
import fastattn
from test_replace_small_gpt import Gpt, TARGETS, TOKENS, step

def model():
    torch.manual_seed(0)
    return Gpt()

def compare(ours, parameters, name):
    for _ in range(2):
        ours.zero_grad()
        logits, our_loss = ours(TOKENS, TARGETS)
        our_loss.backward()
    torch.testing.assert_close(our_loss, loss)
    for key, parameter in parameters:
        grad = getattr(parameter.grad, "full_tensor", lambda: parameter.grad)()
        torch.testing.assert_close(grad, grads[key], atol=1e-6, rtol=1e-4)
    print(name, type(logits).__name__)

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
_, loss, grads = step(model())
for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
    ours = model()
    fastattn.replace(ours)
    compare(DistributedDataParallel(ours, **options), ours.named_parameters(), "ddp")
mesh = dist.init_device_mesh("cpu", (1,))
for reshard in (None, True):
    ours = model()
    fastattn.replace(ours)
    for part in (*ours.layers, ours):
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard)
    compare(ours, ours.named_parameters(), "fsdp")
"""


def test_data_parallel_and_sharded():
    """In one process: what DDP and FSDP2 do to outputs and parameters. DDP clones them if it looks for unused ones."""
    lines = run_code(PARALLEL).split("\n")
    assert [line for line in lines if line] == [
        "ddp DeferredLogits", "ddp Tensor", "ddp DeferredLogits", "fsdp DeferredLogits", "fsdp DeferredLogits",
    ]  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_itself(bias):
    """The model.py of nanoGPT's repository, which is no part of this project: FASTATTN_NANOGPT names its path."""
    path = os.environ.get("FASTATTN_NANOGPT")
    if not path:
        pytest.skip("FASTATTN_NANOGPT does not name nanoGPT's model.py")
    theirs = types.SimpleNamespace(**runpy.run_path(path, run_name="model"))
    model = theirs.GPT(theirs.GPTConfig(SEQLEN, VOCAB, n_layer=2, n_head=HEADS, n_embd=D, bias=bias))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    _, exact, exact_grads = step(copy.deepcopy(model).double())
    _, loss, grads = step(model)
    tokens = model.eval().generate(TOKENS[:, :4], 20, top_k=1)
    report = fastattn.replace(model.train())
    assert report.left == {}
    assert collections.Counter(what.partition(" ")[0] for what in report.replaced.values()) == {
        "Linear": 8, "LayerNorm": 5, "attention": 2, "output": 1,
    }  # fmt: skip
    our_logits, ours, our_grads = step(model)
    assert our_logits._made is None
    assert_accurate(ours, exact, loss, slack=torch.finfo(torch.float32).eps * exact.item())
    for name, grad in our_grads.items():
        assert_accurate(grad, exact_grads[name], grads[name], BACKWARD, f"gradient of {name}")
    assert torch.equal(model.eval().generate(TOKENS[:, :4], 20, top_k=1), tokens)
