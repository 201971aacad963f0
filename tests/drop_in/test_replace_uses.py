"""What people do with a model after `replace`: other ways to generate, new words, heads, images, higher derivatives."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
import transformers
from transformers_families import FAMILIES, GROUPED, VERSION, inputs_of, logits_and_gradients, model_of

import fastattn

NEWEST = pytest.mark.skipif(VERSION < (5, 24), reason="written for the arguments of transformers 5.24")


def eager(family):
    model = copy.deepcopy(model_of(family))
    model.set_attn_implementation("eager")
    return model


def pair(family):
    """A model, and a copy of it after replacement."""
    models = eager(family), eager(family)
    fastattn.replace(models[1])
    return models


def close(ours, theirs, factor=1.0):
    torch.testing.assert_close(ours, theirs, atol=2e-5 * factor * theirs.abs().max().item(), rtol=1e-4)


def close_gradients(ours, theirs, factor=1.0):
    assert ours.keys() == theirs.keys()
    largest = max(grad.abs().max().item() for grad in theirs.values())
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, atol=2e-5 * factor * largest, rtol=1e-3, msg=name)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


WAYS = {
    "prompt lookup": lambda family: {"prompt_lookup_num_tokens": 3},
    "assistant": lambda family: {"assistant_model": eager(family).eval()},
    "prompt in chunks": lambda family: {"prefill_chunk_size": 4},
}


@NEWEST
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_other_ways_to_generate(family, way):
    ids = inputs_of("decoder", "whole", seqlen=14)[0]["input_ids"][:1]
    options = {"input_ids": ids, "max_new_tokens": 12, "do_sample": False}
    theirs, ours = (model.eval().generate(**options, **WAYS[way](family)) for model in pair(family))
    assert torch.equal(ours, theirs)
    assert theirs[:, 14:].unique().numel() > 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_new_words(family):
    """After `resize_token_embeddings`, logits, gradients and the loss without logits."""
    found = []
    given, real = inputs_of(FAMILIES[family][2], "right")
    labels = given.get("decoder_input_ids", given["input_ids"])
    for model in pair(family):
        torch.manual_seed(0)
        model.resize_token_embeddings(48, mean_resizing=False)
        found.append((*logits_and_gradients(model, given, real), model(**given, labels=labels).loss))
    (logits, grads, loss), (our_logits, our_grads, our_loss) = found
    assert logits.shape[-1] == 48
    close(our_logits, logits)
    close_gradients(our_grads, grads)
    close(our_loss, loss)


# class: (family, padding); classifiers of a row find its last token, the others give numbers for padding too
HEADS = {
    "LlamaForSequenceClassification": ("llama", "right"),
    "GPT2ForSequenceClassification": ("gpt2", "right"),
    "BertForTokenClassification": ("bert", "whole"),
    "Qwen3ForQuestionAnswering": ("qwen3", "whole"),
}


@pytest.mark.parametrize("name", HEADS)
def test_other_heads(name):
    family, padding = HEADS[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(copy.deepcopy(model_of(family).config)).train()
    given, _ = inputs_of("encoder", padding)
    found = []
    for _ in range(2):
        model.zero_grad()
        out = model(**given)[0]
        out.square().sum().backward()
        found.append((out.detach(), gradients(model)))
        fastattn.replace(model)
    close(found[1][0], found[0][0])
    close_gradients(found[1][1], found[0][1])


def test_derivatives_of_functions():
    """torch.func.grad of a functional call, which records no graph of autograd.Function's own."""
    plain, ours = (model.eval() for model in pair("llama"))
    ids = inputs_of("decoder", "whole")[0]["input_ids"]
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(values):
        return torch.func.functional_call(ours, values, (ids,), {"use_cache": False}).logits.square().mean()

    plain(ids).logits.square().mean().backward()
    close_gradients(torch.func.grad(loss)(parameters), gradients(plain), factor=3)


def test_second_derivatives():
    found = []
    ids = inputs_of("decoder", "whole")[0]["input_ids"]
    for model in pair("qwen3"):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        out = model(inputs_embeds=embedded, use_cache=False).logits.tanh().sum()
        (grad,) = torch.autograd.grad(out, embedded, create_graph=True)
        grad.square().sum().backward()
        found.append(gradients(model))
    close_gradients(found[1], found[0], factor=5)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "bart", "modernbert", "deepseek_v3"])
def test_checkpointing_both_ways(family, use_reentrant):
    plain, ours = pair(family)
    case = inputs_of(FAMILIES[family][2], "right")
    logits, grads = logits_and_gradients(plain, *case)
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        ours.enable_input_require_grads()
    our_logits, our_grads = logits_and_gradients(ours, *case)
    close(our_logits, logits)
    close_gradients(our_grads, grads)


@NEWEST
def test_images_and_text():
    """Rotary embeddings in the image encoder, packed, and of three positions in the decoder."""
    text = {**GROUPED, "vocab_size": 60}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32,
              "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1], "spatial_merge_size": 2}  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=50, video_token_id=51, vision_start_token_id=52,
        vision_end_token_id=53,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    plain.set_attn_implementation("eager")
    ours = copy.deepcopy(plain)
    report = fastattn.replace(ours)
    assert sum(what.startswith("rotary") for what in report.replaced.values()) == 4
    assert report.left == {}
    ids = torch.tensor([[5, 52, *[50] * 16, 53, 6, 7, 8]])
    given = {"input_ids": ids, "pixel_values": torch.randn(64, 96), "image_grid_thw": torch.tensor([[1, 8, 8]]),
             "mm_token_type_ids": (ids == 50).int()}  # fmt: skip
    close(ours(**given).logits, plain(**given).logits)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(**given, **options), plain.generate(**given, **options))


def test_gradient_checkpointing():
    model = eager("llama")
    fastattn.replace(model)
    given, real = inputs_of("decoder", "left")
    expected, grads = logits_and_gradients(model, given, real)
    model.gradient_checkpointing_enable()
    got, got_grads = logits_and_gradients(model, given, real)
    assert torch.equal(got, expected)
    assert all(torch.equal(got_grads[name], grad) for name, grad in grads.items())
