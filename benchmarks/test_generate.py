"""Greedy generation with a key-value cache, batch 1: ours in three dtypes of weights, transformers, CTranslate2.

All candidates have the same random weights in the shape of GPT-2 small and continue one token by NEW tokens. Candidates
that convert weights do so before the timing starts. The limit is reading the bytes of the weights once a
token at the rate of the memory, which `test_read_rate` prints (run it with -s). Under --benchmark-disable the model is
tiny, and the texts are compared.
"""

import json
import logging

import pytest
import torch
from conftest import fastest

from fastattn.models import CausalLM, KeyValueCache

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the weights are read from the CPU's memory")

GPT2_SMALL = {"n_layer": 12, "n_head": 12, "d_model": 768, "block_size": 1024}
TINY = {"n_layer": 2, "n_head": 2, "d_model": 64, "block_size": 64}
NEW = 8
SIZES = {"fp32": 4, "bf16": 2, "int8": 1}  # bytes of an element


@pytest.fixture(scope="module")
def model(request):
    """Our model; its weights are drawn so wide that the most likely token is clearly the most likely."""
    torch.manual_seed(0)
    tiny = request.config._benchmarksession.disabled
    shape, vocab_size = (TINY, 512) if tiny else (GPT2_SMALL, 50257)
    model = CausalLM(vocab_size, feed_forward="gelu_tanh", **shape).eval()
    with torch.no_grad():
        model.token_embedding.weight.mul_(5)
    return model


@pytest.fixture(scope="module")
def theirs(model):
    """The same model of Hugging Face transformers, on its eager attention."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    vocab_size, d_model = model.token_embedding.weight.shape
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=model.block_size, n_embd=d_model, n_layer=len(model.blocks),
        n_head=model.blocks[0].self_attn.num_heads, attn_implementation="eager", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    gpt2 = transformers.GPT2LMHeadModel(config).eval()
    copy_to_gpt2(model, gpt2.transformer)
    return gpt2


@torch.no_grad()
def copy_to_gpt2(model, gpt2):
    """Copy the parameters of a CausalLM to those of a GPT2Model, whose linear layers hold the transposed weight."""
    gpt2.wte.weight.copy_(model.token_embedding.weight)
    gpt2.wpe.weight.copy_(model.position_embedding.weight)
    pairs = [(gpt2.ln_f, model.norm)]
    for block, h in zip(model.blocks, gpt2.h, strict=True):
        pairs += [(h.ln_1, block.norm1), (h.ln_2, block.norm2)]
        h.attn.c_attn.weight.copy_(block.self_attn.in_proj_weight.t())
        h.attn.c_attn.bias.copy_(block.self_attn.in_proj_bias)
        linears = (h.attn.c_proj, block.self_attn.out_proj), (h.mlp.c_fc, block.linear1), (h.mlp.c_proj, block.linear2)
        for target, source in linears:
            target.weight.copy_(source.weight.t())
            target.bias.copy_(source.bias)
    for target, source in pairs:
        target.load_state_dict(source.state_dict())


def ctranslate2_generators(theirs, folder, kinds):
    """{dtype: CTranslate2's generator of the model of transformers}; skips without the package."""
    ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")
    vocab_size = theirs.config.vocab_size
    theirs.save_pretrained(folder / "gpt2")
    names = {f"t{number}": number for number in range(vocab_size - 1)} | {"<|endoftext|>": vocab_size - 1}
    (folder / "gpt2" / "vocab.json").write_text(json.dumps(names))
    (folder / "gpt2" / "merges.txt").write_text("#version: 0.2\n")
    transformers = pytest.importorskip("transformers")
    transformers.GPT2Tokenizer(str(folder / "gpt2/vocab.json"), str(folder / "gpt2/merges.txt")).save_pretrained(
        folder / "gpt2"
    )
    logging.getLogger("ctranslate2").setLevel(logging.ERROR)
    converted = ctranslate2.converters.TransformersConverter(str(folder / "gpt2")).convert(str(folder / "ct2"))
    threads = torch.get_num_threads()
    return {
        kind: ctranslate2.Generator(converted, device="cpu", compute_type=kind, intra_threads=threads) for kind in kinds
    }


def weight_bytes(model):
    """Bytes of fp32 weights that one token reads; of the positions it reads one row."""
    return 4 * (model.num_parameters() - model.position_embedding.weight.numel())


def test_read_rate(request, model):
    """The rate of a sum over 256 MiB, and the tokens/s at which the weights would be read at that rate."""
    if request.config._benchmarksession.disabled:
        pytest.skip("a rate is nothing to verify")
    x = torch.ones(2**26)
    rate = x.nbytes / fastest(x.sum)
    limits = [f"{kind} {rate / weight_bytes(model) * 4 / size:.1f}" for kind, size in SIZES.items()]
    print(f"\nreading 256 MiB: {rate * 1e-9:.1f} GB/s; limits in tokens/s: {', '.join(limits)}")


def our_tokens(model, first, kind):
    """A function that continues the token `first`, as fastattn.training's stream_tokens does at temperature 0."""
    with torch.no_grad():
        cache = KeyValueCache(model, 1, weights=None if kind == "fp32" else kind)

    @torch.inference_mode()
    def call():
        cache.length, found = 0, [torch.tensor([[first]])]
        for _ in range(NEW):
            found.append(model(found[-1], cache=cache, last=True)[:, -1].argmax(-1, keepdim=True))
        return torch.cat(found[1:])[:, 0]

    return call


def compare_tokens(compare, model, kind, candidates):
    # a rounded model may choose another token; tests/training shows that ours is the text of the rounded model
    verify = candidates if kind == "fp32" else {name: lambda: torch.tensor(0.0) for name in candidates}
    compare(candidates, verify=verify)


@pytest.mark.parametrize("kind", SIZES)
def test_generate(compare, model, theirs, kind):
    """transformers, which reads fp32 weights, against ours with weights of each dtype."""
    first = 7

    def transformers_tokens():
        tokens = torch.tensor([[first]])
        with torch.inference_mode():
            return theirs.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
                use_cache=True, pad_token_id=0, eos_token_id=None,
            )[0, 1:]  # fmt: skip

    candidates = {"transformers eager": transformers_tokens, f"fastattn {kind}": our_tokens(model, first, kind)}
    compare_tokens(compare, model, kind, candidates)


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_ctranslate2(compare, model, theirs, kind, tmp_path):
    """CTranslate2 against ours with the same dtype of weights; with int8 its activations are int8 too."""
    name = {"fp32": "float32"}.get(kind, kind)
    generator, first = ctranslate2_generators(theirs, tmp_path, [name])[name], 7

    def peer():
        found = generator.generate_batch(
            [[f"t{first}"]], max_length=NEW, min_length=NEW, sampling_topk=1, include_prompt_in_result=False,
            end_token=[],
        )  # fmt: skip
        return torch.tensor(found[0].sequences_ids[0][:NEW])

    compare_tokens(
        compare, model, kind, {f"CTranslate2 {kind}": peer, f"fastattn {kind}": our_tokens(model, first, kind)}
    )
