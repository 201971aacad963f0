"""`replace` on tiny models of transformers with random weights: results, gradients, tokens, and the way back."""

import copy
import io

import pytest
import torch
from allocated import allocated_peak
from oracle import BACKWARD, assert_accurate

pytest.importorskip("transformers", reason="transformers is not installed")
import transformers
from transformers_families import (
    DECODER,
    ENCODER,
    FAMILIES,
    GROUPED,
    NO_FP64,
    PADDINGS,
    SEQ2SEQ,
    VERSION,
    VISION,
    assert_same,
    has_own_attention,
    inputs_of,
    logits_and_gradients,
    model_of,
    plain_implementation,
    quantised_cache,
)

import fastattn

# family: number of norms that are taken over
NORMS = {
    "llama": 5, "mistral": 5, "mixtral": 5, "qwen2": 5, "qwen3": 9, "gemma2": 9, "gemma3": 13, "phi3": 5, "olmo2": 9,
    "gpt_oss": 5, "llama4": 6, "deepseek_v3": 9, "gpt2": 5, "gpt_neox": 5, "bert": 6, "roberta": 6, "distilbert": 6,
    "modernbert": 6, "t5": 12, "bart": 12, "whisper": 12, "vit": 5, "siglip": 6, "clip": 11,
}  # fmt: skip


# family: number of feed-forward blocks that are taken over
FEED_FORWARD = dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "llama4", "deepseek_v3", "modernbert"),
    2,
) | {"t5": 4}
if VERSION < (5, 0):
    FEED_FORWARD["mixtral"] = 4  # each expert is a separate block in these families
# family: modules that are left alone
LEFT = {
    "llama4": {f"model.layers.{i}.feed_forward.router" for i in range(2)},  # subclasses of torch.nn.Linear
}
# families of whose two layers our op rotates queries and keys
ROTARY = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "gpt_oss", "llama4",
    "deepseek_v3", "gpt_neox", "modernbert",
)  # fmt: skip
# families whose model has a head for a vocabulary
HEADS = [family for family in FAMILIES if family not in ("vit", "siglip", "clip")]


LARGE_VOCABULARY = {"vocab_size": 8000, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                    "num_attention_heads": 2}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def plain():
    with plain_implementation(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastattn.ops.linear, "_LEAST", 0)  # our product serves layers of these sizes too
        yield


def taken_over(model):
    """Whether all linear layers of torch.nn and transformers have been replaced."""
    kinds = {type(module) for module in model.modules()}
    return torch.nn.Linear not in kinds and transformers.pytorch_utils.Conv1D not in kinds


def eager(family):
    model = copy.deepcopy(model_of(family))
    model.set_attn_implementation("eager")
    return model


def compare(family, dtype, padding, ours, theirs, exact):
    """Logits and gradients by their errors against fp64."""
    assert_accurate(ours[0], exact[0], theirs[0], what=f"logits, {padding}")
    assert ours[1].keys() == theirs[1].keys()
    largest = max(grad.abs().max().item() for grad in exact[1].values())
    for name, grad in ours[1].items():
        slack = torch.finfo(torch.float32).eps * largest
        if name.endswith(
            ("k_proj.bias", "key.bias", "k_lin.bias")
        ):  # 0 in exact arithmetic: only rounding errors are left
            weight = exact[1][name.replace("bias", "weight")]
            slack = 4 * torch.finfo(dtype).eps * weight.abs().max().item()
        assert_accurate(grad, exact[1][name], theirs[1][name], BACKWARD, f"gradient of {name}, {padding}", slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients(family, dtype):
    """With every kind of padding that the family takes, and packed rows; then the way back."""
    if family in NO_FP64:
        pytest.skip("in this version of transformers the family does not run in fp64")
    own = has_own_attention(family)
    if (family, dtype, own) == ("t5", torch.bfloat16, True):
        pytest.skip("T5's relu in bfloat16 makes the larger error a matter of luck where both have the same attention")
    cases = {padding: inputs_of(FAMILIES[family][2], padding) for padding in PADDINGS[FAMILIES[family][2]]}
    model = eager(family).double()
    model.set_attn_implementation("plain")
    exact = {padding: logits_and_gradients(model, *case) for padding, case in cases.items()}
    model = eager(family).to(dtype)
    theirs = {padding: logits_and_gradients(model, *case) for padding, case in cases.items()}
    state, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    report = fastattn.replace(model)
    assert set(report.left) == LEFT.get(family, set()) | ({""} if own else set())
    assert taken_over(model)
    assert ("output layer whose loss needs no logits" in report.replaced.values()) == (family in HEADS)
    assert sum("Norm" in what for what in report.replaced.values()) == NORMS[family]
    assert sum("feed-forward" in what for what in report.replaced.values()) == FEED_FORWARD.get(family, 0)
    assert sum("rotary" in what for what in report.replaced.values()) == 2 * (family in ROTARY and not own)
    assert own or report.replaced[""] == "attention, attn_implementation='fastattn' (was 'eager')"
    assert list(model.state_dict()) == state
    for padding, case in cases.items():
        ours = logits_and_gradients(model, *case)
        compare(family, dtype, padding, ours, theirs[padding], exact[padding])
    report.undo()
    assert [type(module) for module in model.modules()] == kinds
    for padding, case in cases.items():
        again, again_grads = logits_and_gradients(model, *case)
        logits, grads = theirs[padding]
        assert torch.equal(again, logits)
        assert all(torch.equal(again_grads[name], grad) for name, grad in grads.items())


@pytest.mark.parametrize("family", HEADS)
def test_loss_without_logits(family):
    """With labels, some of them ignored: the loss, its gradients, and the logits if they are read."""
    given, real = inputs_of(FAMILIES[family][2], "whole" if family == "whisper" else "right")
    labels = given.get("decoder_input_ids", given.get("input_ids")).masked_fill(~real.bool(), -100)
    found, models = [], [eager(family), eager(family)]
    fastattn.replace(models[1], only="loss")
    for model in models:
        out = model(**given, labels=labels)
        out.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((out.loss, grads, out.logits))
    (loss, grads, logits), (our_loss, our_grads, our_logits) = found
    assert our_logits._made is None
    torch.testing.assert_close(our_loss, loss)
    largest = max(grad.abs().max().item() for grad in grads.values())
    assert our_grads.keys() == grads.keys()
    for name, grad in our_grads.items():
        torch.testing.assert_close(grad, grads[name], atol=1e-5 * largest, rtol=1e-4)
    # not bit for bit: our product may serve one of the two, in another order of sums
    torch.testing.assert_close(our_logits, logits, atol=1e-6 * logits.abs().max().item(), rtol=1e-5)


CACHES = {
    "dynamic": lambda model: {},
    "static": lambda model: {"cache_implementation": "static"},
    "quantised": quantised_cache,
    "none": lambda model: {"use_cache": False},
}
GENERATES = [family for family in HEADS if FAMILIES[family][2] in ("decoder", "seq2seq", "audio")]


@pytest.mark.parametrize("family", GENERATES)
def test_generated_tokens(family):
    """With each cache; where layers have a window, 14 + 10 tokens are beyond it."""
    model, kind = eager(family).eval(), FAMILIES[family][2]
    given, _ = inputs_of(kind if kind == "audio" else "decoder", "right" if kind == "seq2seq" else "left", seqlen=14)
    given.pop("decoder_input_ids", None)
    caches = dict(CACHES)
    if kind != "decoder":
        del caches["quantised"]  # transformers makes a pair of caches there
    if (family, VERSION < (5, 0)) == ("deepseek_v3", True):
        del caches["static"]  # it gives values the size of keys, and DeepSeek V3 has two sizes

    def tokens():
        options = {"max_new_tokens": 10, "do_sample": False}
        if kind == "audio":
            options["no_repeat_ngram_size"] = 1  # otherwise the model repeats one token
        return {name: model.generate(**given, **options, **cache(model)) for name, cache in caches.items()}

    expected = tokens()
    fastattn.replace(model)
    for name, got in tokens().items():
        assert torch.equal(got, expected[name]), name
    assert expected["dynamic"].unique().numel() > 1


def test_an_error_in_the_middle_leaves_the_model_as_it_was(monkeypatch):
    model = eager("gpt_oss")
    case = inputs_of("decoder", "left")
    expected, kinds = logits_and_gradients(model, *case), [type(module) for module in model.modules()]
    experts = fastattn.drop_in.experts

    def fails():
        raise MemoryError

    monkeypatch.setattr(experts, "change_class", lambda *args: experts.Change("", fails))
    with pytest.raises(MemoryError):
        fastattn.replace(model, padding_free=True)
    assert model.config._attn_implementation == "eager"
    assert [type(module) for module in model.modules()] == kinds
    logits, grads = logits_and_gradients(model, *case)
    assert torch.equal(logits, expected[0])
    assert all(torch.equal(grads[name], grad) for name, grad in expected[1].items())


def peak_of_step(model, tokens):
    def step():
        model.zero_grad(set_to_none=False)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        return ()

    step()
    return allocated_peak(step)


def test_memory_of_a_step():
    """Beyond its weights, a fifth of what torch's loss needs; twice the tokens take at most twice as much."""
    config = transformers.LlamaConfig(**LARGE_VOCABULARY, attn_implementation="sdpa")
    model = transformers.LlamaForCausalLM(config).train()
    tokens = torch.randint(3, 8000, (1, 2048))
    theirs = peak_of_step(model, tokens)
    fastattn.replace(model)
    ours, half = peak_of_step(model, tokens), peak_of_step(model, tokens[:, :1024])
    assert ours < theirs / 5
    assert ours < 2.1 * half


def test_copies_and_checkpoints(tmp_path):
    model = eager("gemma3").eval()
    given, _ = inputs_of("decoder", "whole")
    expected = model(**given).logits
    fastattn.replace(model)
    ours = model(**given).logits
    torch.testing.assert_close(ours, expected)
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
        assert torch.equal(twin(**given).logits, ours)
    model.save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(plain) is type(eager("gemma3"))
    torch.testing.assert_close(plain(**given).logits, expected)
    model.load_state_dict(eager("gemma3").state_dict())


def test_compiled():
    model = eager("llama").eval()
    given, _ = inputs_of("decoder", "whole")
    expected = model(**given).logits
    fastattn.replace(model)
    torch._dynamo.reset()
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(**given, use_cache=False).logits
    torch.testing.assert_close(got, expected)


def test_lora():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(eager("llama"), config)
    given, _ = inputs_of("decoder", "right")
    ours = copy.deepcopy(theirs)
    before = eager("llama")
    fastattn.replace(before)
    torch.manual_seed(0)
    first = peft.get_peft_model(before, config)  # replaced, then LoRA
    fastattn.replace(ours)  # LoRA, then replaced
    found = []
    for model in (theirs, ours, first):
        out = model(**given, labels=given["input_ids"])
        out.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((out.logits[given["attention_mask"].bool()], grads))
    for logits, grads in found[1:]:
        torch.testing.assert_close(logits, found[0][0])
        for name, grad in found[0][1].items():
            torch.testing.assert_close(grads[name], grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer(tmp_path, bf16):
    """Accumulation, gradient checkpointing, an evaluation with logits: the losses of the unreplaced model."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    ids = torch.randint(3, 40, (8, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    losses = []
    for replaced in (False, True):
        model = eager("llama")
        if replaced:
            fastattn.replace(model)
        options = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3, bf16=bf16,
            gradient_checkpointing=True, use_cpu=True, report_to=[], logging_steps=1, learning_rate=1e-2,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, options, train_dataset=data, eval_dataset=data)
        trainer.train()
        logits = trainer.predict(data).predictions
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry] + [logits.std()])
    assert len(losses[0]) == 4
    assert losses[0][2] < losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02 if bf16 else 1e-4, atol=0)


SMALL = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
OTHERS = {
    # class: (config, number of norms, what else)
    "DebertaModel": ({**SMALL, "intermediate_size": 48}, 3, []),
    "DebertaV2Model": ({**SMALL, "intermediate_size": 48}, 3, []),
    "FalconModel": ({**SMALL, "attn_implementation": "sdpa"}, 2, ["attention"]),
    "T5EncoderModel": ({"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4,
                        "feed_forward_proj": "gated-gelu", "attn_implementation": "eager"}, 3,
                       ["attention", "gated feed-forward"]),
    "ConvNextModel": ({"hidden_sizes": [8, 12, 16, 16], "depths": [1, 1, 1, 1], "image_size": 32}, 9, []),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_which_only_a_part_is_replaced(name):
    changes, norms, more = OTHERS[name]
    if name == "T5EncoderModel" and has_own_attention("t5"):
        more = more[1:]
    model = getattr(transformers, name)(getattr(transformers, name).config_class(**changes)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn(parameter.shape, generator=generator)
    given = torch.randn(2, 3, 32, 32) if name == "ConvNextModel" else torch.randint(3, 40, (2, 9))
    found = []
    for _ in range(2):
        model.zero_grad()
        out = model(given).last_hidden_state
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
        grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        found.append((out.detach(), grads))
        report = fastattn.replace(model)
        if len(found) == 1:
            kinds = [what for what in report.replaced.values() if "Norm" not in what and what != "Linear"]
            assert sum("Norm" in what for what in report.replaced.values()) == norms
            assert [what[: len(start)] for what, start in zip(kinds, more, strict=True)] == more
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-4)
    largest = max(grad.abs().max().item() for grad in found[0][1].values())
    for key, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], grad, atol=1e-5 * largest, rtol=1e-3)


OPT = {**DECODER, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# class: (config, kind of inputs); families that only this test has
MORE = {
    "CohereForCausalLM": (GROUPED, "decoder"),
    "StableLmForCausalLM": (GROUPED, "decoder"),
    "GraniteForCausalLM": (GROUPED, "decoder"),
    "GraniteMoeForCausalLM": ({**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1}, "decoder"),
    "GlmForCausalLM": (GROUPED, "decoder"),
    "SmolLM3ForCausalLM": (GROUPED, "decoder"),
    "Qwen3MoeForCausalLM": ({**GROUPED, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 24},
                            "decoder"),
    "OPTForCausalLM": (OPT, "decoder"),
    "PhiForCausalLM": ({**GROUPED, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, "decoder"),
    "BloomForCausalLM": ({**DECODER, "n_head": 4, "n_layer": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0},
                         "decoder"),
    "ElectraForMaskedLM": ({**ENCODER, **NO_DROPOUT, "embedding_size": 16}, "encoder"),
    "AlbertForMaskedLM": ({**ENCODER, "embedding_size": 16}, "encoder"),
    "MarianMTModel": ({**SEQ2SEQ, "dropout": 0.0}, "seq2seq"),
    "BeitForImageClassification": ({**VISION, **NO_DROPOUT, "drop_path_rate": 0.0}, "vision"),
    "Dinov2ForImageClassification": ({**VISION, "mlp_ratio": 2}, "vision"),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_more_families(name):
    changes, kind = MORE[name]
    config = getattr(transformers, name).config_class(**copy.deepcopy(changes))
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).train()
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    model.set_attn_implementation("eager")
    case = inputs_of(kind, "whole" if kind == "vision" else "right")
    logits, grads = logits_and_gradients(model, *case)
    report = fastattn.replace(model)
    # attention that no attn_implementation reaches
    own = name == "BloomForCausalLM" or (VERSION < (5, 24) and not model._can_set_attn_implementation())
    assert set(report.left) == ({""} if own else set())
    assert own or report.replaced[""].startswith("attention")
    assert_same(logits_and_gradients(model, *case), (logits, grads))
    report.undo()
    assert torch.equal(logits_and_gradients(model, *case)[0], logits)
