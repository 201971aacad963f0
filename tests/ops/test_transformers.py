"""attn_implementation="fastattn": tiny models of transformers with random weights, against their eager attention."""

import copy
import subprocess
import sys

import pytest
import torch
from oracle import BACKWARD, assert_accurate
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", reason="transformers is not installed")
import transformers
from transformers import masking_utils
from transformers_families import (
    FAMILIES,
    NO_FP64,
    PADDINGS,
    VERSION,
    VOCAB,
    inputs_of,
    logits_and_gradients,
    model_of,
    plain_attention,
    plain_implementation,
)  # fmt: skip

from fastattn.integrations import transformers as integration
from fastattn.integrations import transformers_versions as versions


@pytest.fixture(scope="module", autouse=True)
def plain():
    with plain_implementation():
        yield


def run(model, implementation, given, real):
    model.set_attn_implementation(implementation)
    return logits_and_gradients(model, given, real)


CASES = [(family, padding) for family, (_, _, kind) in FAMILIES.items() for padding in PADDINGS[kind]]


def check_against_eager(family, padding, dtype):
    if family in NO_FP64:
        pytest.skip("in this version of transformers the family does not run in fp64")
    given, real = inputs_of(FAMILIES[family][2], padding)
    model = model_of(family)
    exact, exact_grads = run(copy.deepcopy(model).double(), "plain", given, real)
    model = copy.deepcopy(model).to(dtype)
    logits, grads = run(model, "eager", given, real)
    ours, our_grads = run(model, "fastattn", given, real)
    assert_accurate(ours, exact, logits, what="logits")
    assert our_grads.keys() == grads.keys()
    for name, grad in our_grads.items():
        # the few numbers of a bias or a norm are sums over rows, where eager may be exact by luck; those of a bias may
        # cancel, and those of keys are 0 in exact arithmetic
        few = exact_grads.get(name.replace(".bias", ".weight"), grad) if grad.dim() == 1 else grad.new_zeros(1)
        slack = 4 * torch.finfo(dtype).eps * few.abs().max().item()
        assert_accurate(grad, exact_grads[name], grads[name], BACKWARD, f"gradient of {name}", slack)


@pytest.mark.parametrize(("family", "padding"), CASES, ids=lambda value: value)
def test_logits_and_gradients(family, padding):
    check_against_eager(family, padding, torch.float32)


@pytest.mark.parametrize(
    ("family", "padding"),
    [("llama", "left"), ("mistral", "packed"), ("gemma2", "right"), ("gpt_oss", "left"), ("t5", "right"),
     ("bert", "right")],
)  # fmt: skip
def test_logits_and_gradients_in_bfloat16(family, padding):
    check_against_eager(family, padding, torch.bfloat16)


CACHES = [
    *((family, cache, 1) for family in ("llama", "mistral", "gemma3", "gpt_oss", "t5", "gpt2", "deepseek_v3")
      for cache in ("dynamic", "static")),
    *((family, "dynamic", 1) for family in ("gemma2", "llama4", "qwen3", "phi3", "bart")),
    *((family, cache, 3) for family in ("mistral", "t5") for cache in ("dynamic", "static")),
]  # fmt: skip


@pytest.mark.parametrize(("family", "cache", "beams"), CACHES, ids=str)
def test_generated_tokens(family, cache, beams):
    """Mistral, Gemma and gpt-oss have sliding layers in each cache: 14 + 10 tokens are beyond their window."""
    if (family, cache) == ("deepseek_v3", "static") and VERSION < (5, 0):
        pytest.skip("the static cache of this version gives values the size of keys, and DeepSeek V3 has two sizes")
    model = copy.deepcopy(model_of(family)).eval()
    given, _ = inputs_of("decoder", "right" if FAMILIES[family][2] == "seq2seq" else "left", seqlen=14)
    found = {}
    for implementation in ("eager", "fastattn"):
        model.set_attn_implementation(implementation)
        found[implementation] = model.generate(
            **given, max_new_tokens=10, do_sample=False, num_beams=beams, cache_implementation=cache
        )
    assert torch.equal(found["fastattn"], found["eager"])
    assert found["eager"].unique().numel() > 1


def test_several_new_tokens_on_a_cache():
    """Chunks of a prompt, as in assisted generation: more than one query at the end of the keys."""
    for family in ("llama", "mistral"):
        model = copy.deepcopy(model_of(family)).eval()
        given, _ = inputs_of("decoder", "left")
        found = {}
        for implementation in ("eager", "fastattn"):
            model.set_attn_implementation(implementation)
            cache, logits = transformers.DynamicCache(config=model.config), []
            for start, end in ((0, 13), (13, 18), (18, 24)):
                out = model(
                    given["input_ids"][:, start:end], attention_mask=given["attention_mask"][:, :end],
                    past_key_values=cache,
                )  # fmt: skip
                logits.append(out.logits.detach())
            found[implementation] = torch.cat(logits, 1)[given["attention_mask"].bool()]
        torch.testing.assert_close(found["fastattn"], found["eager"], atol=1e-5, rtol=1e-5)


LEFT_PADDING = torch.tensor([0, 3])
POSITIONS = torch.cat([torch.arange(5), torch.arange(1), torch.arange(6)])[None].expand(2, -1)
DOCUMENTS = torch.tensor([0] * 5 + [1] + [2] * 6)[None].expand(2, -1)


def packed_documents(function, *, restart=True):
    """As newer versions of transformers compose them: positions restart in each document, which chunks count from."""
    if restart and hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        function = masking_utils.remap_positions_for_packed_sequence(function, POSITIONS)
    return masking_utils.and_masks(function, masking_utils.packed_sequence_mask_function(DOCUMENTS))


FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(4),
    "chunks": masking_utils.chunked_causal_mask_function(4, LEFT_PADDING),
    "packed": packed_documents(masking_utils.causal_mask_function),
    "packed window": packed_documents(masking_utils.sliding_window_causal_mask_function(3)),
    "packed window, older": packed_documents(masking_utils.sliding_window_causal_mask_function(3), restart=False),
    "packed chunks": packed_documents(masking_utils.chunked_causal_mask_function(2, torch.zeros(2, dtype=torch.int64))),
}
if versions.bidirectional_mask_function is not None:  # in transformers 4.57 encoders make their masks themselves
    FUNCTIONS["two-sided"] = versions.bidirectional_mask_function
if hasattr(masking_utils, "sliding_window_bidirectional_mask_function"):
    FUNCTIONS["two-sided window"] = masking_utils.sliding_window_bidirectional_mask_function(3)
# (queries, keys, position of the first query, position of the first key)
LENGTHS = {
    "all": (12, 12, 0, 0), "one": (1, 12, 11, 0), "some": (4, 12, 8, 0), "static, start": (12, 16, 0, 0),
    "static, some": (4, 16, 8, 0), "static, one": (1, 16, 8, 0), "sliding": (5, 9, 10, 6),
}  # fmt: skip
REAL = {
    "whole": None,
    "left": torch.arange(16) >= LEFT_PADDING[:, None],
    "right": torch.arange(16) < 16 - 5 * LEFT_PADDING[:, None],
    "holes": torch.arange(16) % 5 != LEFT_PADDING[:, None],
    "one row": torch.arange(16) < 16 * (1 - LEFT_PADDING[:, None]),
}  # fmt: skip


def spelled_out(mask):
    """The bool mask for `fastattn.attention` that a VisibleKeys describes."""
    visible, (batch, _, n_queries, n_keys) = mask.visible, mask.shape
    query, key = torch.arange(n_queries)[:, None], torch.arange(visible.n_keys)
    found = torch.ones(batch, n_queries, visible.n_keys, dtype=torch.bool)
    if visible.lengths is not None:
        found &= key < visible.lengths[:, None, None]
        assert visible.window is None or visible.causal == "top_left"
    place = query + (0 if visible.causal == "top_left" else visible.n_keys - n_queries)
    if visible.causal:
        found &= key <= place
    left, right = visible.window or (-1, -1)
    found &= (key >= place - left) | torch.tensor(left < 0)
    found &= (key <= place + right) | torch.tensor(right < 0)
    if visible.cu_seqlens is not None:
        ids = torch.bucketize(torch.arange(batch * n_queries), visible.cu_seqlens[1:], right=True).view(batch, -1)
        found &= ids[:, :, None] == ids[:, None, :]
    elif visible.padding is not None:
        found &= visible.padding[:, 0]
    return torch.nn.functional.pad(found, (0, n_keys - visible.n_keys))[:, None]


MASKS = [
    (function, lengths, real) for function in FUNCTIONS for lengths in LENGTHS for real in REAL
    # transformers looks for packed documents only without a cache and without padding
    if "packed" not in function or (lengths, real) == ("all", "whole")
]  # fmt: skip


@pytest.mark.parametrize(("function", "lengths", "real"), MASKS)
def test_the_words_mean_the_mask(function, lengths, real):
    """Rows of padding may see anything; a mask with elements appears only where it is expected."""
    n_queries, n_keys, q_offset, kv_offset = LENGTHS[lengths]
    padding = REAL[real]
    if padding is not None:
        padding = padding[:, : q_offset + n_queries]
    given = {
        "batch_size": 2, "q_length": n_queries, "kv_length": n_keys, "q_offset": q_offset, "kv_offset": kv_offset,
        "mask_function": FUNCTIONS[function], "attention_mask": padding,
    }  # fmt: skip
    mask = integration.attention_mask(**given, dtype=torch.float32, config=None, use_vmap=False, local_size=4)
    dense = versions.dense_mask(**given, device="cpu", allow_is_causal_skip=False)
    assert mask.shape == dense.shape
    assert torch.equal(mask & True, dense)  # an unknown operation gets the elements
    needs_elements = function == "chunks" and ("some" in lengths or lengths == "sliding" or real == "holes")
    needs_elements &= lengths not in ("one", "static, one")
    needs_elements |= function == "two-sided window" and n_queries - n_keys != kv_offset - q_offset
    assert isinstance(mask, integration.VisibleKeys) != needs_elements
    if not needs_elements:
        rows = dense.any(-1, keepdim=True)
        if padding is not None and n_queries == n_keys - (lengths == "static, start") * 4 and mask.visible.causal:
            rows = rows & padding[:, None, q_offset : q_offset + n_queries, None]
        assert torch.equal(spelled_out(mask) & rows, dense & rows)


def test_views_that_change_nothing_have_no_elements():
    mask = integration.attention_mask(2, 8, 8)
    for view in (mask[:, :, :, :8], mask.detach(), mask[:, :, -8:]):
        assert isinstance(view, integration.VisibleKeys)
        assert view.visible == mask.visible
    assert not isinstance(mask[:, :, :, :4], integration.VisibleKeys)
    assert "causal=True" in repr(mask)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and not isinstance(t, integration.VisibleKeys):
                self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.parametrize(
    ("family", "padding"),
    [
        case
        for case in CASES
        if case[0] in ("llama", "gemma2", "gpt_oss", "llama4")
        or (case[0] == "bert" and versions.bidirectional_mask_function is not None)
    ],
)
def test_no_mask_of_queries_times_keys(family, padding):
    kind = FAMILIES[family][2]
    seqlen = 448
    given, real = inputs_of(kind, padding, seqlen)
    model = copy.deepcopy(model_of(family))
    for implementation in ("eager", "fastattn"):
        with LargestTensor() as mode:
            run(model, implementation, given, real)
        assert (mode.largest < seqlen * seqlen) == (implementation == "fastattn")


def test_packed_documents_by_cu_seq_lens():
    model = model_of("mistral")
    ids = torch.randint(3, VOCAB, (1, 20), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(7), torch.arange(13)])[None]
    ends = torch.tensor([0, 7, 20])
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 13, "max_length_k": 13}
    given = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    expected, _ = run(model, "eager", given, torch.ones(1, 20))
    model.set_attn_implementation("fastattn")
    for position_ids in (positions, None):
        found = model(input_ids=ids, position_ids=position_ids, **lengths).logits[0]
        alone = found if position_ids is not None else found[:7]
        torch.testing.assert_close(alone, expected[: len(alone)], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="cu_seq_lens_q and cu_seq_lens_k must be given together"):
        model(input_ids=ids, cu_seq_lens_q=ends)
    with pytest.raises(ValueError, match="must come with a batch of 1"):
        model(input_ids=ids.expand(2, -1), cu_seq_lens_q=ends, cu_seq_lens_k=ends)


def heads(n=4, seqlen=6):
    return torch.randn(2, n, seqlen, 8, generator=torch.Generator().manual_seed(0))


MODULE = torch.nn.Module()


@pytest.mark.parametrize(
    "refused",
    [{"output_attentions": True}, {"head_mask": torch.ones(4)}, {"block_table": torch.ones(1)}, {"seq_idx": 1},
     {"a_new_argument": 0.5}, {"sinks": torch.ones(4)}],
    ids=lambda refused: next(iter(refused)),
)  # fmt: skip
def test_arguments_that_mean_something_are_refused(refused):
    (label,) = refused
    with pytest.raises(ValueError, match=f"the argument {label} is not supported"):
        integration.attention_forward(MODULE, heads(), heads(), heads(), None, **refused)
    integration.attention_forward(MODULE, heads(), heads(), heads(), None, shift_labels=heads(), ignore_index=0)
    nothing = dict.fromkeys(refused, None) | {"use_cache": True, "output_attentions": False}
    integration.attention_forward(MODULE, heads(), heads(), heads(), None, **nothing)


def test_masks_of_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="attention_mask must be \\(batch, heads or 1"):
        integration.attention_forward(MODULE, heads(), heads(), heads(), torch.ones(2, 6))
    mask = integration.attention_mask(2, 6, 9)
    with pytest.raises(ValueError, match="must be for 6 queries and 6 keys"):
        integration.attention_forward(MODULE, heads(), heads(), heads(), mask)
    with pytest.raises(ValueError, match="sliding_window=3 without an attention mask"):
        integration.attention_forward(MODULE, heads(), heads(), heads(), None, is_causal=False, sliding_window=3)


def test_without_a_mask_the_module_says_what_is_causal():
    q, k, v = heads(), heads(2, 9), heads(2, 9)
    sdpa = transformers.AttentionInterface()["sdpa"]
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    for is_causal in (None, True, False):
        expected, _ = sdpa(module, q, k, v, None, is_causal=is_causal)
        found, weights = integration.attention_forward(module, q, k, v, None, is_causal=is_causal)
        torch.testing.assert_close(found, expected)
        assert found.is_contiguous()
        assert weights is None


def test_masks_of_floats_and_position_bias():
    q, k, v = (heads().requires_grad_() for _ in range(3))
    bias = torch.randn(1, 4, 6, 6, requires_grad=True)
    given = {"batch_size": 2, "q_length": 6, "kv_length": 6, "attention_mask": torch.arange(6) > torch.ones(2, 1)}
    seen = versions.dense_mask(q_offset=0, device="cpu", allow_is_causal_skip=False, **given)
    compact = integration.attention_mask(**given)
    assert compact.visible.cu_seqlens is not None
    expected = plain_attention(MODULE, q, k, v, seen, position_bias=bias)[0][:, 2:]
    for mask in (seen, compact, torch.zeros(2, 1, 6, 6).masked_fill(~seen, -torch.inf)):
        found = integration.attention_forward(MODULE, q, k, v, mask, position_bias=bias)[0][:, 2:]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        for ours, theirs in zip(*(torch.autograd.grad(t.square().sum(), (q, k, v, bias), retain_graph=True)
                                  for t in (found, expected)), strict=True):  # fmt: skip
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_dropout_drops_attention_weights_in_training_only():
    model = copy.deepcopy(model_of("llama"))
    given, _ = inputs_of("decoder", "left")
    model.set_attn_implementation("fastattn")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    torch.manual_seed(0)
    assert not torch.equal(model(**given).logits, model(**given).logits)
    model.eval()
    assert torch.equal(model(**given).logits, model(**given).logits)


def test_gradient_checkpointing():
    model = copy.deepcopy(model_of("mistral"))
    given, real = inputs_of("decoder", "left")
    _, expected = run(model, "fastattn", given, real)
    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        _, grads = run(model, "fastattn", given, real)
        assert all(torch.equal(grads[name], grad) for name, grad in expected.items())


def test_in_a_graph_the_mask_has_elements():
    model = copy.deepcopy(model_of("llama")).eval()
    given, real = inputs_of("decoder", "left")
    model.set_attn_implementation("fastattn")
    expected = model(**given, use_cache=False).logits
    found = torch.compile(model, backend="eager", fullgraph=True)(**given, use_cache=False).logits
    torch.testing.assert_close(found[real.bool()], expected[real.bool()], atol=1e-5, rtol=1e-5)


def test_fastattn_imports_no_transformers():
    code = (
        "import sys, fastattn; assert 'transformers' not in sys.modules;"
        "fastattn.register(); from transformers import AttentionInterface; assert 'fastattn' in AttentionInterface()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
