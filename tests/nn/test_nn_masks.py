"""What the modules pass to the attention op: flags and views if these are enough, and no seqlen × seqlen tensor."""

import ctypes
import weakref

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn.nn.attention
from fastattn import nn
from fastattn.nn.masks import is_causal_mask

E, H, N, S = 8, 2, 2, 64  # every activation is smaller than S × S

MODULES = {
    "MultiheadAttention": lambda: nn.MultiheadAttention(E, H, batch_first=True),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(E, H, 2 * E, batch_first=True),
    "TransformerEncoder": lambda: nn.TransformerEncoder(MODULES["TransformerEncoderLayer"](), 2),
    "TransformerDecoderLayer": lambda: nn.TransformerDecoderLayer(E, H, 2 * E, batch_first=True),
    "TransformerDecoder": lambda: nn.TransformerDecoder(MODULES["TransformerDecoderLayer"](), 2),
    "Transformer": lambda: nn.Transformer(E, H, 1, 1, 2 * E, batch_first=True),
}


STACKS = ("TransformerEncoder", "TransformerDecoder", "Transformer")  # these check whether a mask is the causal one
CASES = [(kind, form) for form in ("full", "hint", "hint_and_mask") for kind in MODULES]
CASES += [(kind, "mask_detected") for kind in STACKS]


def run(kind, module, x, mask, padding, hint):
    """Call the module on x, with the arguments under the names that it uses."""
    if kind == "MultiheadAttention":
        return module(x, x, x, padding, need_weights=False, attn_mask=mask, is_causal=bool(hint))
    if kind.startswith("TransformerEncoder"):
        hint = {} if hint is None else {"is_causal": hint}
        return module(x, mask, src_key_padding_mask=padding, **hint)
    paddings = {"tgt_key_padding_mask": padding, "memory_key_padding_mask": padding}
    hint = {} if hint is None else {"tgt_is_causal": hint}
    if kind == "Transformer":
        hints = hint | ({"src_is_causal": hint["tgt_is_causal"]} if hint else {})
        return module(x, x, mask, mask, src_key_padding_mask=padding, **paddings, **hints)
    return module(x, x, mask, **paddings, **hint)


class Largest(TorchDispatchMode):
    """Records the number of elements of the memory behind the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor) and not any(t is argument for argument in args):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return result


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of every call of the op."""
    seen, op = [], fastattn.nn.attention.attention

    def spy(q, k, v, **kwargs):
        seen.append(kwargs)
        return op(q, k, v, **kwargs)

    monkeypatch.setattr(fastattn.nn.attention, "attention", spy)
    return seen


def causal_mask():
    return torch.nn.Transformer.generate_square_subsequent_mask(S)


def padding_mask(dtype):
    mask = torch.zeros(N, S, dtype=torch.bool)
    mask[1, S // 2 :] = True
    return mask if dtype == torch.bool else torch.zeros(N, S).masked_fill(mask, -torch.inf)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padding", [None, torch.bool, torch.float32], ids=["unpadded", "bool", "float"])
@pytest.mark.parametrize(("kind", "form"), CASES)
def test_what_reaches_the_op(kind, form, padding, training, calls):
    torch.manual_seed(0)
    module, x = MODULES[kind]().train(training), torch.randn(N, S, E)
    mask = causal_mask() if form in ("hint_and_mask", "mask_detected") else None
    key_padding = None if padding is None else padding_mask(padding)
    hint = {"full": False, "mask_detected": None}.get(form, True)
    largest = Largest()
    with largest:
        run(kind, module, x, mask, key_padding, hint)
    assert calls
    for n, call in enumerate(calls):
        cross = n == 2 if kind == "Transformer" else "Decoder" in kind and n % 2 == 1
        assert call["causal"] == ("top_left" if form != "full" and not cross else False)
        for name, dtype in (("mask", torch.bool), ("bias", torch.float32)):
            if padding == dtype:
                assert call[name].shape == (N, 1, 1, S)
            else:
                assert call[name] is None
    assert largest.elements < S * S


def change_data(mask):
    mask.data = torch.zeros_like(mask)


def change_by_numpy(mask):
    (mask.view(torch.int16) if mask.dtype == torch.bfloat16 else mask).numpy()[:] = 0


def change_in_inference_mode(mask):
    with torch.inference_mode():
        mask.zero_()


CHANGES = {
    "data": change_data,
    "data in place": lambda mask: mask.data.zero_(),
    "numpy": change_by_numpy,
    "dlpack": lambda mask: torch.from_dlpack(mask.detach()).zero_(),
    "memory": lambda mask: ctypes.memset(mask.data_ptr(), 0, mask.nbytes),
    "inference mode": change_in_inference_mode,
    "view": lambda mask: mask[:].zero_(),
    "set": lambda mask: mask.set_(torch.zeros_like(mask)),
    "swap": lambda mask: torch.utils.swap_tensors(mask, torch.zeros_like(mask)),
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", STACKS)
def test_a_changed_mask_is_never_taken_for_the_causal_one(kind, change, dtype):
    """A causal mask may later change in ways that no version counter shows."""
    torch.manual_seed(0)
    x, mask = torch.randn(N, 8, E), torch.nn.Transformer.generate_square_subsequent_mask(8)
    mask = mask.bool() if dtype == torch.bool else mask.to(dtype)
    module = MODULES[kind]().eval()
    if dtype != torch.bool and dtype != torch.float32:  # float masks have the dtype of the query
        module, x = module.to(dtype), x.to(dtype)
    causal = run(kind, module, x, mask, None, None)
    assert torch.equal(causal, run(kind, module, x, None, None, True))
    CHANGES[change](mask)
    full = run(kind, module, x, mask, None, None)
    torch.testing.assert_close(full, run(kind, module, x, None, None, None))
    assert not torch.allclose(full, causal, atol=1e-2)


@pytest.mark.parametrize("kind", STACKS)
def test_a_stack_keeps_no_reference_to_a_mask(kind):
    """A tensor with a weak reference cannot be swapped, which load_state_dict may be told to do."""
    module, x = MODULES[kind]().eval(), torch.randn(N, S, E)
    module.register_buffer("own", causal_mask())
    run(kind, module, x, module.own, None, None)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.load_state_dict(module.state_dict())
        module.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert weakref.getweakrefcount(module.own) == 0


def layouts(mask):
    """The same mask in other memory layouts."""
    size = len(mask)
    yield mask
    yield mask.t().contiguous().t()
    yield torch.nn.functional.pad(mask, (3, 2, 1, 4), value=1)[1 : size + 1, 3 : size + 3]
    wide = torch.zeros(2 * size, 3 * size, dtype=mask.dtype)
    wide[::2, ::3] = mask
    yield wide[::2, ::3]
    yield torch.nn.Parameter(mask, requires_grad=False)


DTYPES = [torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 2, 5, 64, 300, 600])
def test_detection_reads_every_element(size, dtype):
    """The kernel for the CPU and the comparison for other devices agree on masks that differ in one element."""
    compared = fastattn.ops._register._is_causal_mask
    mask = torch.ones(size, size).triu(1).bool()
    if dtype != torch.bool:
        mask = torch.zeros(size, size, dtype=dtype).masked_fill(mask, -torch.inf)
    for layout in layouts(mask):
        assert is_causal_mask(layout, None, size)
        assert compared(layout)
    where = {(i % size, j % size) for i in (0, 1, -1, size // 2) for j in (0, 1, -1, size // 2)} if size else ()
    for i, j in where:
        wrong = [not mask[i, j]] if dtype == torch.bool else [-1.0, torch.nan, torch.inf, torch.finfo(dtype).min]
        wrong += [] if dtype == torch.bool else [0.0 if j > i else -torch.inf]
        for value in wrong:
            for layout in layouts(mask):
                other = layout.detach()
                before, other[i, j] = other[i, j].clone(), value
                assert not is_causal_mask(other, None, size)
                assert size > 300 or not compared(other)
                other[i, j] = before
    if dtype != torch.bool:
        assert is_causal_mask(mask.masked_fill(mask == 0, -0.0), None, size)
    assert not is_causal_mask(mask.to(torch.int32), None, size)
    assert not compared(mask.to(torch.int32))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_recorded_function_reads_its_mask():
    """The content of the mask during recording must not affect later calls."""
    stack, x = MODULES["TransformerEncoder"]().eval(), torch.randn(N, S, E)
    full, causal = torch.zeros(S, S), causal_mask()
    recorded = {
        ("make_fx", mode, pre): make_fx(stack, tracing_mode=mode, pre_dispatch=pre, _allow_non_fake_inputs=True)
        for mode in ("real", "symbolic")
        for pre in (False, True)
    }
    with torch.no_grad():
        functions = {name: record(x, causal) for name, record in recorded.items()}
        functions["jit"] = torch.jit.trace(stack, (x, causal))
        functions["export"] = torch.export.export(stack, (x, causal)).module()
        functions["compile"] = torch.compile(stack, backend="eager")
        for name, function in functions.items():
            for mask in (causal, full):
                torch.testing.assert_close(function(x, mask), stack(x, mask), msg=lambda m, name=name: f"{name}: {m}")


def test_the_measure_sees_a_square():
    with Largest() as largest:
        causal_mask()
    assert largest.elements >= S * S
