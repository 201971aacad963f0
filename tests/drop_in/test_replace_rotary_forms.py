"""Which functions of rotary application `replace` recognises, and those of models of transformers."""

import sys

import pytest
import torch
from rotary_functions import (
    apply_rotary,
    apply_rotary_and_scale,
    apply_rotary_and_sort,
    apply_rotary_backwards,
    apply_rotary_by_broadcast,
    apply_rotary_complex,
    apply_rotary_detached,
    apply_rotary_in_eight_bits,
    apply_rotary_interleaved,
    apply_rotary_of_first_half,
    apply_rotary_of_half_tables,
    apply_rotary_on_a_gpu,
    apply_rotary_packed,
    apply_rotary_to_a_part,
    apply_rotary_to_many,
    apply_rotary_to_one,
    apply_rotary_to_q,
    count_calls,
)

import fastattn
from fastattn.drop_in import rotary

FORMS = {
    # function: (layout, rank, tables) of each form, then what is not the default
    apply_rotary: ("bhsd 3 full, bshd 2 full, shd 2 full", {"swaps"}),
    apply_rotary_to_a_part: ("bhsd 3 full, bshd 2 full, shd 2 full", {"partial"}),
    apply_rotary_interleaved: ("bhsd 3 full, bshd 2 full, shd 2 full", {"interleaved", "mixed"}),
    apply_rotary_of_half_tables: ("bhsd 3 half, bshd 2 half, shd 2 half", set()),
    apply_rotary_packed: ("bshd 3 full, bshd 2 full, shd 2 full", set()),
    apply_rotary_backwards: ("bhsd 3 full, bshd 2 full, shd 2 full", {"backwards"}),
    apply_rotary_of_first_half: ("bhsd 3 first", {"interleaved"}),
    apply_rotary_and_sort: ("bhsd 3 first", {"sorts"}),
    apply_rotary_to_one: ("bshd 3 half", {"interleaved"}),
    apply_rotary_by_broadcast: ("bhsd 2 half, bhsd 4 half, bshd 4 half", set()),
    apply_rotary_complex: ("bshd 3 half", {"interleaved", "mixed"}),
    apply_rotary_to_q: ("bhsd 2 full, bhsd 4 full, bshd 4 full", set()),
}


@pytest.mark.parametrize("function", FORMS, ids=lambda f: f.__name__)
def test_forms(function):
    forms = rotary.forms_of(function)
    kinds, options = FORMS[function]
    assert ", ".join(f"{form.layout} {form.rank} {form.tables}" for form in forms) == kinds
    assert {name for name, value in forms[0]._asdict().items() if value is True} == options


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (apply_rotary_and_scale, "computes no rotation that our op has"),
        (apply_rotary_detached, "computes no rotation that our op has"),
        (apply_rotary_in_eight_bits, "gives other numbers than our op in bfloat16"),
        (apply_rotary_to_many, "gives other numbers than our op for other lengths or without gradients"),
        (apply_rotary_on_a_gpu, "raises RuntimeError for small tensors on the CPU"),
        (lambda query, cos: query, "takes other arguments than one or two tensors and their cos and sin"),
        (max, "takes other arguments than one or two tensors and their cos and sin"),
    ],
)
def test_what_computes_something_else(function, reason):
    assert rotary.forms_of(function) == reason


SHAPES = {
    # function: shapes of q, k and the tables that it broadcasts and our op does not
    "one row for all tokens, packed": (apply_rotary_packed, (5, 3, 8), (5, 3, 8), (1, 8)),
    "one row for all tokens": (apply_rotary, (2, 3, 5, 8), (2, 3, 5, 8), (2, 1, 8)),
    "tables of more rows": (apply_rotary, (1, 3, 5, 8), (1, 3, 5, 8), (2, 5, 8)),
    "other tokens in k": (apply_rotary, (2, 3, 1, 8), (2, 3, 5, 8), (2, 5, 8)),
    "other rows in k": (apply_rotary, (2, 3, 5, 8), (1, 3, 5, 8), (2, 5, 8)),
    "three dimensions": (apply_rotary, (3, 5, 8), (3, 5, 8), (5, 8)),
    "a table without rows": (apply_rotary_to_a_part, (2, 3, 5, 8), (2, 3, 5, 8), (2, 5, 0)),
}


def outcome(function, *given):
    try:
        return function(*given)
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_the_function_broadcasts(name):
    """Our stand-in gives the bits of the function, and the error where it has one."""
    function, *shapes, table = SHAPES[name]
    q, k, cos, sin = (torch.randn(shape) for shape in (*shapes, table, table))
    cos, sin = (torch.cat([t[..., : table[-1] // 2]] * 2, -1) for t in (cos, sin))
    stand_in = rotary.Rotate({"function": function}, "function")
    theirs, ours = (outcome(rotate, q, k, cos, sin) for rotate in (function, stand_in))
    assert ours == theirs if isinstance(theirs, str) else all(map(torch.equal, ours, theirs))


@pytest.fixture
def served(monkeypatch):
    return count_calls(monkeypatch)


SCALED = {
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "linear": {"rope_type": "linear", "factor": 3.0},
}  # fmt: skip


def compared(model, served, **given):
    """The hidden states before and after replacement; returns the number of calls of our op."""
    expected = model(**given).last_hidden_state
    report = fastattn.replace(model, only="rotary")
    assert sum(what.startswith("rotary") for what in report.replaced.values()) == model.config.num_hidden_layers
    served.clear()
    torch.testing.assert_close(model(**given).last_hidden_state, expected, atol=2e-5, rtol=1e-4)
    calls = len(served)
    report.undo()
    assert torch.equal(model(**given).last_hidden_state, expected)
    return calls


@pytest.mark.parametrize("scaling", SCALED)
def test_tables_of_models(scaling, served):
    """The model makes the tables, also where they depend on the length of the input."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers_families import GROUPED, VERSION

    name = "rope_parameters" if VERSION >= (5, 0) else "rope_scaling"
    scaled = SCALED[scaling] | ({"rope_theta": 10000.0} if VERSION >= (5, 0) else {})
    config = transformers.LlamaConfig(**{**GROUPED, "max_position_embeddings": 16, name: scaled})
    model = transformers.LlamaModel(config).eval()
    assert compared(model, served, input_ids=torch.randint(3, 40, (2, 24))) == 2


@pytest.mark.parametrize(
    ("name", "calls"),
    [("gptj", 4), ("codegen", 4), ("gemma3n_text", 4), ("deepseek_v2", 2), ("deepseek_v3", 2), ("llama4_text", 1)],
)
def test_forms_of_models(name, calls, served):
    """One tensor at a time, complex numbers, sorted channels: each call of the two layers runs on our op."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers_families import DECODER, FAMILIES, GROUPED

    deepseek = FAMILIES["deepseek_v3"][1]
    changes = {
        "deepseek_v2": {**deepseek, "head_dim": 8},
        "deepseek_v3": deepseek,
        "llama4_text": FAMILIES["llama4"][1],  # its second layer has no positions
        "gemma3n_text": {**GROUPED, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 40,
                         "laurel_rank": 4, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]},
    }.get(name, {**DECODER, "rotary_dim": 4})  # fmt: skip
    try:
        model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name, **changes)).eval()
    except ModuleNotFoundError as error:  # of timm without torchvision, in older versions
        pytest.skip(str(error))
    assert compared(model, served, input_ids=torch.randint(3, 40, (2, 9))) == calls


def test_tables_of_three_positions(served):
    """M-RoPE: time, height and width each turn some of the channels."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers_families import GROUPED, VERSION

    parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    name = "rope_parameters" if VERSION >= (5, 0) else "rope_scaling"
    config = transformers.Qwen2_5_VLTextConfig(**GROUPED, **{name: parameters})
    model = transformers.Qwen2_5_VLTextModel(config).eval()
    if hasattr(sys.modules[type(model).__module__], "apply_multimodal_rotary_pos_emb"):
        pytest.skip("in this version attention itself divides the tables among the channels")
    positions = torch.randint(0, 30, (3, 2, 9))
    assert compared(model, served, input_ids=torch.randint(3, 40, (2, 9)), position_ids=positions) == 2
