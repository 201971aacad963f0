"""Rotary application under `replace`: which functions are recognised, and what the modules compute afterwards."""

import copy
import functools
import io
import sys

import pytest
import torch

import fastattn
from fastattn.drop_in import rotary, rotary_forms
from fastattn.ops._backends import why_not_available
from fastattn.ops.rotary import rotate_tokens

HEADS, D = 3, 8


def turn_half(x):
    low, high = x.chunk(2, -1)
    return torch.cat((-high, low), -1)


def turn_neighbours(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def apply_rotary(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + turn_half(q) * sin, k * cos + turn_half(k) * sin


def apply_rotary_to_a_part(q, k, cos, sin):
    n = cos.shape[-1]
    turned = apply_rotary(q[..., :n], k[..., :n], cos, sin)
    return tuple(torch.cat([t, x[..., n:]], -1) for t, x in zip(turned, (q, k), strict=True))


def apply_rotary_interleaved(q, k, cos, sin):
    cos, sin = cos[:, None].float(), sin[:, None].float()
    return tuple((x.float() * cos + turn_neighbours(x.float()) * sin).to(x.dtype) for x in (q, k))


def apply_rotary_of_half_tables(q, k, cos, sin):
    return apply_rotary(q, k, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))


def apply_rotary_packed(q, k, cos, sin):
    return apply_rotary(q, k, cos, sin, unsqueeze_dim=-2)


def apply_rotary_backwards(q, k, cos, sin):
    return apply_rotary(q, k, cos, -sin)


def apply_rotary_of_first_half(q, k, cos, sin):
    """As GLM has it."""
    half = cos.shape[-1] // 2
    cos, sin = (t[:, None, :, :half].repeat_interleave(2, -1) for t in (cos, sin))
    return q * cos + turn_neighbours(q) * sin, k * cos + turn_neighbours(k) * sin


def apply_rotary_and_sort(q, k, cos, sin):
    """As DeepSeek V3 has it."""
    turned = apply_rotary_of_first_half(q, k, cos, sin)
    return tuple(torch.cat([t[..., ::2], t[..., 1::2]], -1) for t in turned)


def apply_rotary_to_one(tensor, sin, cos):
    """As GPT-J has it."""
    cos, sin = (t[:, :, None].repeat_interleave(2, -1) for t in (cos, sin))
    return tensor * cos + turn_neighbours(tensor) * sin


def apply_rotary_by_broadcast(x, cos, sin):
    """As modules have it whose tables are (1, tokens, 1, pairs)."""
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def apply_rotary_complex(xq, xk, freqs_cis):
    """As Llama 4 has it."""
    complex_numbers = (torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) for x in (xq, xk))
    turned = (torch.view_as_real(x * freqs_cis[:, :, None]).flatten(-2) for x in complex_numbers)
    return tuple(t.type_as(x) for t, x in zip(turned, (xq, xk), strict=True))


def apply_rotary_and_scale(q, k, cos, sin):
    q, k = apply_rotary(q, k, cos, sin)
    return 2 * q, k


def apply_rotary_detached(q, k, cos, sin):
    return tuple(t.detach() for t in apply_rotary(q, k, cos, sin))


def apply_rotary_in_eight_bits(q, k, cos, sin):
    """Right in fp32; in bfloat16 it rounds to fewer bits."""
    out = apply_rotary(q, k, cos, sin)
    return out if q.dtype == torch.float32 else tuple(t.to(torch.float8_e5m2).to(q.dtype) for t in out)


def apply_rotary_on_a_gpu(q, k, cos, sin):
    raise RuntimeError("q must be on a GPU")


def apply_rotary_to_q(x, cos, sin):
    return x * cos + turn_half(x) * sin


FORMS = {
    # function: (layout, rank, tables) of each form, then what is not the default
    apply_rotary: ("bhsd 3 full, bshd 2 full, shd 2 full", {"swaps"}),
    apply_rotary_to_a_part: ("bhsd 3 full, bshd 2 full, shd 2 full", {"partial"}),
    apply_rotary_interleaved: ("bhsd 3 full, bshd 2 full, shd 2 full", {"interleaved", "mixed"}),
    apply_rotary_of_half_tables: ("bhsd 3 half, bshd 2 half, shd 2 half", set()),
    apply_rotary_packed: ("bshd 3 full, bshd 2 full, shd 2 full", set()),
    apply_rotary_backwards: ("bhsd 3 full, bshd 2 full, shd 2 full", {"backwards"}),
    apply_rotary_of_first_half: ("bhsd 3 first", {"interleaved"}),
    apply_rotary_and_sort: ("bhsd 3 first", {"interleaved", "sorts"}),
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
        (apply_rotary_on_a_gpu, "raises RuntimeError for small tensors on the CPU"),
        (lambda query, cos: query, "takes other arguments than one or two tensors and their cos and sin"),
        (max, "takes other arguments than one or two tensors and their cos and sin"),
    ],
)
def test_what_computes_something_else(function, reason):
    assert rotary.forms_of(function) == reason


def deprecated(function):
    """A decorator as transformers has them: it changes a keyword, and the function is in its closure."""

    @functools.wraps(function)
    def wrapped(self, *args, **kwargs):
        if "hidden" in kwargs:
            kwargs["x"] = kwargs.pop("hidden")
        return function(self, *args, **kwargs)

    return wrapped


class Attention(torch.nn.Module):
    """The scores of attention, on rotated queries and keys."""

    def __init__(self):
        super().__init__()
        self.q, self.k = (torch.nn.Linear(12, HEADS * D) for _ in range(2))

    def projected(self, x):
        return (layer(x).unflatten(-1, (HEADS, D)).transpose(1, 2) for layer in (self.q, self.k))

    @deprecated
    def forward(self, x, cos, sin, *, scale=0.25):
        q, k = apply_rotary(*self.projected(x), cos, sin)
        return q @ k.mT * scale + len(super().extra_repr())


class Swapped(Attention):
    def forward(self, x, cos, sin):
        q, k = apply_rotary(*(t.transpose(1, 2) for t in self.projected(x)), cos, sin, unsqueeze_dim=2)
        return q.transpose(1, 2) @ k.permute(0, 2, 3, 1)


class Partial(Attention):
    def forward(self, x, cos, sin):
        cos, sin = (torch.cat([t[..., :2], t[..., :2]], -1) for t in (cos, sin))
        q, k = apply_rotary_to_a_part(*self.projected(x), cos, sin)
        return q @ k.mT


class Interleaved(Attention):
    def forward(self, x, cos, sin):
        cos, sin = (t.chunk(2, -1)[0].repeat_interleave(2, -1) for t in (cos, sin))
        q, k = apply_rotary_interleaved(*self.projected(x), cos, sin)
        return q @ k.mT


class HalfTables(Attention):
    def forward(self, x, cos, sin):
        q, k = apply_rotary_of_half_tables(*self.projected(x), cos[..., :4], sin[..., :4])
        return q @ k.mT


class Packed(Attention):
    def forward(self, x, cos, sin):
        q, k = apply_rotary_packed(*(t[0].transpose(0, 1) for t in self.projected(x)), cos[0], sin[0])
        return q.transpose(0, 1) @ k.permute(1, 2, 0)


class Backwards(Attention):
    def forward(self, x, cos, sin):
        q, k = apply_rotary_backwards(*self.projected(x), cos, sin)
        return q @ k.mT


class Sorted(Attention):
    def forward(self, x, cos, sin):
        q, k = apply_rotary_and_sort(*self.projected(x), cos, sin)
        return q @ k.mT


class OneByOne(Attention):
    def forward(self, x, cos, sin):
        q, k = (t.transpose(1, 2) for t in self.projected(x))
        q, k = (apply_rotary_to_one(t, cos=cos[..., :4], sin=sin[..., :4]) for t in (q, k))
        return q.transpose(1, 2) @ k.permute(0, 2, 3, 1)


class Complex(Attention):
    def forward(self, x, cos, sin):
        q, k = (t.transpose(1, 2) for t in self.projected(x))
        q, k = apply_rotary_complex(q, k, torch.complex(cos[..., :4].float(), sin[..., :4].float()))
        return q.transpose(1, 2) @ k.permute(0, 2, 3, 1)


class Scaled(Attention):
    def forward(self, x, cos, sin):
        q, k = apply_rotary_and_scale(*self.projected(x), cos, sin)
        return q @ k.mT


CLASSES = (Attention, Swapped, Partial, Interleaved, HalfTables, Packed, Backwards, Sorted, OneByOne, Complex)


@pytest.fixture
def served(monkeypatch):
    """The calls of our op, without those of the checks, which run once."""
    for function in FORMS:
        rotary.forms_of(function)
    found = []

    def counted(*args, **kwargs):
        found.append(args)
        return rotate_tokens(*args, **kwargs)

    monkeypatch.setattr(rotary_forms, "rotate_tokens", counted)
    return found


def case(kind=Attention, rows=2, dtype=torch.float32):
    torch.manual_seed(0)
    table_rows = torch.randn(rows, 5, D // 2)
    cos, sin = (f(torch.cat([table_rows, table_rows], -1)).to(dtype) for f in (torch.cos, torch.sin))
    return kind().to(dtype), torch.randn(2, 5, 12, dtype=dtype), cos, sin


def run(module, *given, **named):
    module.zero_grad()
    out = module(*given, **named)
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))
    return [out.detach(), *(p.grad.clone() for p in module.parameters())]


def same_bits(a, b):
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", CLASSES)
def test_values_gradients_and_undo(kind, rows, served):
    module, *given = case(kind, rows)
    expected = run(module, *given)
    report = fastattn.replace(module, only="rotary")
    assert report.replaced[""].startswith("rotary embeddings, ")
    assert ("interleaved" in report.replaced[""]) == (kind in (Interleaved, Sorted, OneByOne, Complex))
    got = run(module, *given)
    calls = 2 if kind is OneByOne else 1
    assert len(served) == calls
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    report.undo()
    assert type(module) is kind
    assert same_bits(run(module, *given), expected)
    assert len(served) == calls


@pytest.mark.parametrize("kind", CLASSES)
def test_bfloat16(kind, served):
    """At most the error of the original."""
    module, *given = case(kind)
    exact = run(module, *given)[0]
    module, *given = case(kind, dtype=torch.bfloat16)
    theirs = run(module, *given)[0]
    fastattn.replace(module, only="rotary")
    ours = run(module, *given)[0]
    assert served
    assert (ours - exact).abs().max() <= 1.5 * (theirs - exact).abs().max()


def test_other_functions_are_left_alone():
    module, *given = case(Scaled)
    expected = run(module, *given)
    report = fastattn.replace(module, only="rotary")
    assert report.left == {"": "rotary embeddings: apply_rotary_and_scale computes no rotation that our op has"}
    assert same_bits(run(module, *given), expected)


@pytest.mark.parametrize("kind", [Attention, Swapped, Packed, Backwards])
def test_tables_whose_halves_differ(kind, served):
    """Each channel is turned by its own number, in the gradient too."""
    module, x, cos, sin = case(kind)
    given = x, cos + torch.linspace(0, 1, D), sin * torch.linspace(1, 2, D)
    expected = run(module, *given)
    fastattn.replace(module, only="rotary")
    for ours, theirs in zip(run(module, *given), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert served


@pytest.mark.parametrize("kind", CLASSES)
def test_no_value_is_read(kind, served):
    """On a GPU, each of these operators would wait for the device."""
    module, *given = case(kind)
    fastattn.replace(module, only="rotary")
    with fastattn.use_backend("reference"), torch.autograd.profiler.profile() as profile:
        module(*given).sum().backward()
    assert served
    names = {event.name for event in profile.function_events}
    assert "aten::cat" in names
    assert not names & {f"aten::{name}" for name in ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero")}


def test_tables_that_change(served):
    """What was read of them is not kept across a change, and not for other tensors."""
    module, x, cos, sin = case()
    original = copy.deepcopy(module)
    fastattn.replace(module, only="rotary")
    for change in (lambda: None, lambda: cos.neg_(), lambda: sin[1].zero_(), lambda: cos.copy_(sin)):
        change()
        torch.testing.assert_close(module(x, cos, sin), original(x, cos, sin))
    torch.testing.assert_close(module(x, cos, cos), original(x, cos, cos))  # another sin
    assert len(served) == 5
    with torch.inference_mode():
        cos, sin = cos.clone(), sin.clone()
        for _ in range(2):
            torch.testing.assert_close(module(x, cos, sin), original(x, cos, sin))
            cos.neg_()


CALLS = {
    "double": lambda m, x, c, s: m.double()(x.double(), c.double(), s.double()),
    "autocast": lambda m, x, c, s: _autocast(m, x, c, s),
    "tables with gradients": lambda m, x, c, s: m(x, c.clone().requires_grad_(), s),
    "one table for rows that broadcast": lambda m, x, c, s: m(x[:1], c, s),
    "tables in fp64": lambda m, x, c, s: m(x, c.double(), s.double()),
    "no tokens": lambda m, x, c, s: m(x[:, :0], c[:, :0], s[:, :0]),
    "no rows": lambda m, x, c, s: m(x[:0], c[:0], s[:0]),
    "vmap": lambda m, x, c, s: torch.vmap(m)(x[None], c[None], s[None]),
}


def _autocast(module, *given):
    with torch.autocast("cpu", torch.bfloat16):
        return module(*given)


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_the_function_of_the_module_serves(name, served):
    module, *given = case()
    ours = copy.deepcopy(module)
    fastattn.replace(ours, only="rotary")
    assert torch.equal(CALLS[name](ours, *given), CALLS[name](module, *given))
    assert not served


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


def test_names_that_are_patched_later(monkeypatch, served):
    """The copy of forward reads the current global names, and a function put there is checked like the first."""
    module, *given = case()
    plain = copy.deepcopy(module)
    fastattn.replace(module, only="rotary")

    def apply_another(q, k, cos, sin):
        return q * cos[:, None], k * sin[:, None]

    assert rotary.forms_of(apply_another) == "computes no rotation that our op has"
    served.clear()
    monkeypatch.setattr(sys.modules[__name__], "apply_rotary", apply_another)
    assert torch.equal(module(*given), plain(*given))
    assert not served
    monkeypatch.setattr(Attention, "forward", lambda self, x, cos, sin: x)
    assert module(*given) is given[0]


def test_decorators_and_keywords():
    module, x, cos, sin = case()
    expected = module(hidden=x, cos=cos, sin=sin, scale=2.0)
    fastattn.replace(module, only="rotary")
    torch.testing.assert_close(module(hidden=x, cos=cos, sin=sin, scale=2.0), expected)


def test_copies_and_files(served):
    module, *given = case()
    before = list(module.state_dict())
    fastattn.replace(module, only="rotary")
    assert list(module.state_dict()) == before
    expected = module(*given)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        served.clear()
        assert torch.equal(twin(*given), expected)
        assert served
        assert type(twin) is type(module)


def test_compiled_and_exported(served):
    module, *given = case()
    expected = module(*given)
    fastattn.replace(module, only="rotary")
    torch._dynamo.reset()
    got = torch.compile(module, backend="aot_eager", fullgraph=True)(*given)
    torch.testing.assert_close(got, expected)
    exported = torch.export.export(module, tuple(given)).module()(*given)
    torch.testing.assert_close(exported, expected)
    assert not served


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant, served):
    module, x, *tables = case()
    x.requires_grad_()
    fastattn.replace(module, only="rotary")
    expected = run(module, x, *tables)
    module.zero_grad()
    out = torch.utils.checkpoint.checkpoint(module, x, *tables, use_reentrant=use_reentrant)
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
    assert same_bits([out, *(p.grad for p in module.parameters())], expected)
    assert len(served) == 3


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
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name, **changes)).eval()
    assert compared(model, served, input_ids=torch.randint(3, 40, (2, 9))) == calls


def test_tables_of_three_positions(served):
    """M-RoPE: time, height and width each turn some of the channels."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers_families import GROUPED, VERSION

    if VERSION < (5, 0):
        pytest.skip("in this version attention itself divides the tables among the channels")
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = transformers.Qwen2_5_VLTextConfig(**GROUPED, rope_parameters=parameters)
    model = transformers.Qwen2_5_VLTextModel(config).eval()
    positions = torch.randint(0, 30, (3, 2, 9))
    assert compared(model, served, input_ids=torch.randint(3, 40, (2, 9)), position_ids=positions) == 2


def test_another_device(monkeypatch):
    """There, the function and our kernel must agree on small random numbers, once."""
    asked = []

    def agrees_on(function, device):
        asked.append(device)
        return function is apply_rotary

    monkeypatch.setattr(rotary, "agrees_on", agrees_on)
    monkeypatch.setattr(rotary, "_device_of", lambda module: "cuda")
    assert fastattn.replace(Attention(), only="rotary").replaced
    reason = "gives other numbers than our op on cuda, or our op has no kernel there"
    assert fastattn.replace(Packed(), only="rotary").left == {"": f"rotary embeddings: apply_rotary_packed {reason}"}
    assert asked == ["cuda", "cuda"]


def test_a_device_without_a_kernel():
    module, *given = case()
    fastattn.replace(module, only="rotary")
    out = module.to("meta")(*(t.to("meta") for t in given))
    assert out.shape == (2, HEADS, 5, 5)
    assert not rotary_forms.agrees_on(apply_rotary, "meta")


@pytest.mark.parametrize("kind", [Attention, Partial, Interleaved, Sorted, Complex])
def test_on_triton(kind, served):
    """The kernel of a GPU, in the interpreter: the same tables without a copy, and gradients."""
    reason = why_not_available("triton", "cpu")
    if reason:
        pytest.skip(reason)
    module, x, cos, sin = case(kind)
    expected = run(module, x, cos, sin)
    fastattn.replace(module, only="rotary")
    with fastattn.use_backend("triton"):
        got = run(module, x, cos, sin)
    assert served
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def hidden(function):
    """A decorator that keeps the function where its closure does not show it."""
    wrapped = functools.wraps(function)(lambda *args, **kwargs: wrapped.__wrapped__(*args, **kwargs))
    return wrapped


class Hidden(Attention):
    forward = hidden(Attention.forward)


class Empty(Attention):
    """Whose forward has a closure with an empty cell."""

    def made():
        def forward(self, x, cos, sin):
            q, k = apply_rotary(*self.projected(x), cos, sin)
            return q @ k.mT if self.training or nothing else q

        if not forward:
            nothing = None
        return forward

    forward = made()


class Odd(Attention):
    """Which names something as a rotation that cannot be called with tensors."""

    def forward(self, x, cos, sin):
        return x if apply_rotary_never is None else apply_rotary_never


apply_rotary_never = None


@pytest.mark.parametrize(("kind", "replaced"), [(Hidden, 0), (Empty, 1), (Odd, 0)])
def test_unusual_forwards(kind, replaced):
    module, *given = case(kind)
    expected = module(*given)
    report = fastattn.replace(module, only="rotary")
    assert (len(report.replaced), report.left) == (replaced, {})
    torch.testing.assert_close(module(*given), expected)
