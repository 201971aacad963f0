"""A training step of nanoGPT's CPU settings: nanoGPT's own model, torch's layers and ours.

nanoGPT is not part of this project: FASTATTN_NANOGPT names the path of its model.py (github.com/karpathy/nanoGPT), else
the benchmarks are skipped. Settings from its README: 12 rows of 64 characters, 4 layers of width 128, no biases; a
vocabulary of 65. A step is forward, backward, clipping and AdamW; each model takes the optimizer that its training code
takes. nanoGPT itself has no bf16 on CPUs.
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from conftest import DEVICE

from fastattn.models import CausalLM

VOCAB, LAYERS, HEADS, WIDTH, BLOCK, BATCH = 65, 4, 4, 128, 64, 12
NAMES = {  # of a block: ours → theirs
    "self_attn.in_proj_weight": "attn.c_attn.weight", "self_attn.out_proj.weight": "attn.c_proj.weight",
    "linear1.weight": "mlp.c_fc.weight", "linear2.weight": "mlp.c_proj.weight", "norm1.weight": "ln_1.weight",
    "norm2.weight": "ln_2.weight",
}  # fmt: skip
OTHERS = {
    "token_embedding.weight": "transformer.wte.weight", "position_embedding.weight": "transformer.wpe.weight",
    "norm.weight": "transformer.ln_f.weight",
}  # fmt: skip


@pytest.fixture(scope="module")
def nanogpt():
    path = os.environ.get("FASTATTN_NANOGPT")
    if not path or not Path(path).is_file():
        pytest.skip("FASTATTN_NANOGPT does not name nanoGPT's model.py")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def their_name(name):
    if name in OTHERS:
        return OTHERS[name]
    _, layer, rest = name.split(".", 2)
    return f"transformer.h.{layer}.{NAMES[rest]}"


def models(nanogpt, dropout):
    """nanoGPT's model, and CausalLM on torch's and on our layers with the same weights."""
    torch.manual_seed(0)
    config = nanogpt.GPTConfig(
        block_size=BLOCK, vocab_size=VOCAB, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, dropout=dropout, bias=False
    )
    theirs, weights = nanogpt.GPT(config).to(DEVICE), {}
    for layers in ("torch", "fastattn"):
        model = CausalLM(
            VOCAB, n_layer=LAYERS, n_head=HEADS, d_model=WIDTH, block_size=BLOCK, dropout=dropout, bias=False,
            layers=layers,
        ).to(DEVICE)  # fmt: skip
        model.load_state_dict({name: theirs.state_dict()[their_name(name)] for name in model.state_dict()})
        weights[layers] = model
    return theirs, weights["torch"], weights["fastattn"]


def loss_of(model, tokens, targets):
    found = model(tokens, targets)
    return found[1] if isinstance(found, tuple) else found


def step(model, optimizer, batch, bf16=False):
    model.train()

    def call():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            loss = loss_of(model, *batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return call


def gradients(model, batch, names):
    def call():
        model.eval()  # without dropout, whose masks differ
        loss = loss_of(model, *batch)
        parameters = dict(model.named_parameters())
        return loss, *torch.autograd.grad(loss, [parameters[name] for name in names])

    return call


def adamw(model):
    matrices, vectors = ([p for p in model.parameters() if (p.dim() >= 2) is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_training_step(compare, nanogpt, dropout):
    theirs, torchs, ours = models(nanogpt, dropout)
    names = [name for name, _ in ours.named_parameters()]
    tokens = torch.randint(VOCAB, (BATCH, BLOCK + 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    batch = tokens[:, :-1], tokens[:, 1:].contiguous()
    verify = {
        "nanoGPT": gradients(theirs, batch, [their_name(name) for name in names]),
        "torch.nn": gradients(torchs, batch, names),
        "fastattn": gradients(ours, batch, names),
    }
    in_bf16 = models(nanogpt, dropout)[2]
    candidates = {
        "nanoGPT": step(theirs, theirs.configure_optimizers(0.1, 1e-3, (0.9, 0.99), DEVICE), batch),
        "torch.nn": step(torchs, adamw(torchs), batch),
        "fastattn": step(ours, adamw(ours), batch),
        "fastattn, bf16": step(in_bf16, adamw(in_bf16), batch, bf16=True),
    }
    compare(candidates, verify=verify, tolerance=1e-4)
