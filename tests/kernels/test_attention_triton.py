"""The Triton kernels of attention against the reference in fp64: on a GPU, or on CPU tensors in the interpreter.

The raw ops are called, so every case states exactly what the kernels get. In half of the cases the backward reads out
and lse of the reference, in the others those of the Triton forward: the forward may come from any backend.
"""

import itertools
import math
import random

import pytest
import torch
from memory_guard import far
from oracle import BACKWARD, assert_accurate
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import reference
from fastattn.ops._backends import why_not
from fastattn.ops._register import python_kernel
from fastattn.ops.attention import _reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_reason = fastattn.backends()[DEVICE]["triton"]
pytestmark = [
    pytest.mark.skipif(_reason != "available", reason=f"the Triton backend cannot run here: {_reason}"),
]

forward = torch.ops.fastattn.attention_fwd.triton


def backward(*args):
    """The raw op; what comes last, `deterministic`, says nothing to Triton."""
    return torch.ops.fastattn.attention_bwd.triton(*args, False)


class Case:
    """Arguments of the raw ops. `mask` and `bias`: four letters, f = full, 1 = broadcast, per dimension."""

    def __init__(self, *, batch=1, heads=2, kv_heads=None, sq=70, sk=90, d=32, dv=None, dtype=torch.float32, mask=None,
                 bias=None, bias_dtype=None, sink=False, lengths=None, packed=None, slopes=0, p=0.0, left=-1, right=-1,
                 top_left=False, softcap=0.0, scale=None, bshd=False, seed=0):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(*shape, generator=generator).to(DEVICE)

        def tensor(shape):
            if bshd:
                return randn(shape[0], shape[2], shape[1], shape[3]).to(dtype).transpose(1, 2)
            return randn(*shape).to(dtype)

        def int32(values):
            return None if values is None else torch.tensor(values, dtype=torch.int32, device=DEVICE)

        ends_q, ends_k = packed or (None, None)
        sequences = batch
        if packed:
            batch, sq, sk, sequences = 1, ends_q[-1], ends_k[-1], len(ends_q) - 1
        kv_heads, dv = kv_heads or heads, dv or d
        self.q, self.k = tensor((batch, heads, sq, d)), tensor((batch, kv_heads, sk, d))
        self.v = tensor((batch, kv_heads, sk, dv))

        def scores(letters):
            full = (batch, heads, sq, sk)
            return randn(*[n if letter == "f" else 1 for n, letter in zip(full, letters, strict=True)])

        self.bias = None if bias is None else scores(bias).to(bias_dtype or dtype)
        self.sink = randn(heads) if sink else None
        self.mask = None if mask is None else scores(mask) > -0.3
        self.lengths, self.cu_q, self.cu_k = int32(lengths), int32(ends_q), int32(ends_k)
        self.slopes = None if slopes == 0 else randn(*((heads,), (sequences, heads))[slopes - 1]).abs()
        self.rng = None if p == 0 else torch.tensor([seed - 2**40, 7 * seed + 2**33], device=DEVICE)
        self.options = (sq, sk, left, right, top_left, softcap, p, d**-0.5 if scale is None else scale)
        self.do = randn(batch, heads, sq, dv).to(dtype)
        self.dlse = randn(batch, heads, sq)

    def inputs(self):
        return self.q, self.k, self.v, self.bias, self.sink

    def rest(self):
        return (self.mask, self.lengths, self.cu_q, self.cu_k, self.slopes, self.rng, *self.options)

    def expected(self, convert=lambda t: t):
        """(out, lse, lse_low, gradients) of the reference, with None for inputs that are not there."""
        leaves = [None if t is None else convert(t.detach()).clone().requires_grad_() for t in self.inputs()]
        rest = [convert(t) if torch.is_tensor(t) and t.is_floating_point() else t for t in self.rest()]
        out, lse, low = _reference(*leaves, *rest, True)
        wanted = [t for t in leaves if t is not None]
        finite = torch.where(lse == -math.inf, 0.0, lse)  # the lse of an empty row has no gradient
        grads = iter(
            torch.autograd.grad((out, finite), wanted, (convert(self.do), self.dlse.to(lse.dtype)), allow_unused=True)
        )
        return out.detach(), lse.detach(), low.detach(), [None if t is None else next(grads) for t in leaves]

    def check(self, backward_of="triton"):
        exact_out, exact_lse, _, exact_grads = self.expected(lambda t: t.double())
        plain_out, plain_lse, plain_low, plain_grads = self.expected()
        out, lse, low = forward(*self.inputs(), *self.rest(), True)
        assert_accurate(out, exact_out, plain_out, what="out")
        empty = exact_lse == -math.inf
        assert torch.equal(lse == -math.inf, empty)
        fp32_eps = torch.finfo(torch.float32).eps
        # of the scores, which forward and backward may sum in different orders
        spacing = fp32_eps * (1 + exact_lse[~empty].abs().amax().item() if not empty.all() else 1)
        if not torch.allclose(lse[~empty].double(), exact_lse[~empty], rtol=0, atol=2 * spacing):
            assert_accurate(lse[~empty], exact_lse[~empty], plain_lse[~empty], what="lse")
        if backward_of == "reference":
            out, lse, low = plain_out, plain_lse, plain_low
        saved = out, lse, low
        grads = backward(
            self.do, self.dlse, *self.inputs()[:3], *saved, *self.inputs()[3:], *self.rest(), self.bias is not None
        )
        for name, got, exact, plain in zip(
            ("dq", "dk", "dv", "dbias", "dsink"), grads, exact_grads, plain_grads, strict=True
        ):
            if exact is None:
                continue
            assert got.shape == exact.shape
            allowed = 8 * spacing * exact.abs().amax().item() if exact.numel() else 0.0
            # dp - delta, delta from the rounded out: PyTorch's softmax cancels exactly where a row sees one key
            rows, eps = self.do.double() * exact_out, torch.finfo(self.q.dtype).eps
            if name in ("dbias", "dsink"):
                allowed += eps * rows.square().sum().sqrt().item()
            elif self.q.numel() and self.k.numel() and name != "dv":
                other = (self.k if name == "dq" else self.q).double().nan_to_num(0, 0, 0).square().mean().sqrt()
                delta = 4 * fp32_eps * rows.sum(-1).abs().amax() + eps / 2 * rows.norm(dim=-1).amax()
                allowed += (delta * abs(self.options[-1]) * other).item()
            if not torch.allclose(got.double(), exact, rtol=0, atol=allowed):
                assert_accurate(got, exact, plain, factor=BACKWARD, what=name, slack=allowed)


FEATURES = {
    "plain": {},
    "half": {"dtype": torch.float16, "sq": 129, "d": 64},
    "one_query": {"sq": 1},
    "one_key": {"sk": 1, "right": 0},
    "bshd": {"bshd": True, "batch": 2},
    "causal": {"right": 0},
    "causal_top_left": {"right": 0, "top_left": True, "sq": 100, "sk": 40},
    "causal_longer_queries": {"right": 0, "sq": 100, "sk": 40},
    "window": {"left": 20, "right": 3, "sq": 140, "sk": 140},
    "window_causal_top_left": {"left": 5, "right": 0, "top_left": True, "sq": 30, "sk": 150},
    "window_left_only": {"left": 7},
    "gqa": {"heads": 4, "kv_heads": 2, "right": 0},
    "unequal_head_dims": {"d": 40, "dv": 24},
    "head_dim_8": {"d": 8, "dtype": torch.float16},
    "head_dim_200_256": {"d": 200, "dv": 256, "heads": 1, "sq": 40, "sk": 66},
    "mask_full": {"mask": "ffff", "heads": 1},
    "mask_keys": {"mask": "f11f", "batch": 2},
    "mask_half": {"mask": "1fff", "heads": 1, "dtype": torch.float16},
    "bias_full": {"bias": "ffff"},
    "bias_over_batch": {"bias": "1fff", "batch": 2, "heads": 1},
    "bias_keys": {"bias": "f11f", "batch": 2},
    "bias_queries": {"bias": "11f1"},
    "bias_scalar": {"bias": "1111", "right": 0},
    "bias_fp32_half_q": {"bias": "1fff", "bias_dtype": torch.float32, "dtype": torch.float16},
    "alibi": {"slopes": 1, "right": 0},
    "alibi_per_batch": {"slopes": 2, "batch": 2, "heads": 1},
    "softcap": {"softcap": 2.0},
    "sink": {"sink": True},
    "sink_and_empty_rows": {"sink": True, "lengths": [0, 50], "batch": 2},
    "dropout": {"p": 0.17},
    "dropout_causal": {"p": 0.5, "right": 0, "batch": 2, "heads": 1},
    "lengths": {"lengths": [0, 37, 90], "batch": 3, "heads": 1, "right": 0},
    "packed": {"packed": ([0, 70, 70, 100], [0, 50, 60, 130])},
    "packed_everything": {"packed": ([0, 70, 70, 100], [0, 50, 60, 130]), "lengths": [20, 10, 60], "right": 0, "p": 0.2,
                          "slopes": 2, "sink": True},
    "negative_scale": {"scale": -0.2},
    "zero_scale": {"scale": 0.0},
    "no_keys": {"sk": 0},
    "no_queries": {"sq": 0, "bias": "11f1"},
    "no_batch": {"batch": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_feature(name):
    Case(**FEATURES[name]).check("reference" if len(name) % 2 else "triton")


def random_case(seed):
    """Any features at once, at small sizes."""
    draw = random.Random(seed)

    def maybe(value, chance=0.3):
        return value if draw.random() < chance else None

    letters = ["".join(draw.choice("f1") for _ in range(4)) for _ in range(2)]
    kv_heads = draw.choice([1, 1, 2])
    options = {
        "heads": kv_heads * draw.choice([1, 1, 2]),
        "kv_heads": kv_heads,
        "d": draw.choice([8, 16, 24, 40, 59, 64]),
        "dv": draw.choice([None, None, 16, 48]),
        "dtype": draw.choice([torch.float32, torch.float16]),
        "sink": draw.random() < 0.25,
        "slopes": draw.choice([0, 0, 0, 1, 2]),
        "p": draw.choice([0.0, 0.0, 0.1, 0.5]),
        "left": draw.choice([-1, -1, 0, 3, 20]),
        "right": draw.choice([-1, -1, 0, 0, 5]),
        "top_left": draw.random() < 0.3,
        "softcap": draw.choice([0.0, 0.0, 0.0, 1.5]),
        "seed": seed,
    }
    if options["top_left"]:  # only causal calls have it
        options["right"] = 0
    if draw.random() < 0.25:
        ends = [[0], [0]]
        for _ in range(draw.choice([1, 2, 3])):
            for side in ends:
                side.append(side[-1] + draw.choice([0, 1, 17, 40, 66]))
        options["packed"] = tuple(ends)
        sequences = len(ends[0]) - 1
    else:
        sequences = options["batch"] = draw.choice([1, 2])
        options["sq"], options["sk"] = (draw.choice([1, 9, 33, 64, 65, 97]) for _ in range(2))
        options["mask"], options["bias"] = (maybe(letter) for letter in letters)
        options["bshd"] = draw.random() < 0.5
    options["lengths"] = maybe([draw.choice([0, 5, 31, 64, 200]) for _ in range(sequences)])
    return options


SEEDS = 500 if DEVICE == "cuda" else 60  # the interpreter takes half a second for one


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_random_combinations_cover_every_feature(dtype):
    used = set()
    for options in filter(lambda options: options["dtype"] == dtype, map(random_case, range(SEEDS))):
        used |= {name for name, value in options.items() if value not in (None, False, 0, -1)}
        used |= {"gqa"} if options["heads"] > options["kv_heads"] else set()
    features = "mask bias sink slopes p left right top_left softcap packed lengths bshd dv gqa"
    assert not set(features.split()) - used


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_combination(seed):
    options = random_case(seed)
    print(options)
    Case(**options).check(("reference", "triton")[seed % 2])


@pytest.fixture
def launchers():
    """The module with the plans of launches, to be patched: nothing that it planned before or in the test is kept."""
    from fastattn.kernels import attention_call

    attention_call.plan_for.cache_clear()
    yield attention_call
    attention_call.plan_for.cache_clear()


@pytest.mark.parametrize("blocks", [(32, 64), (64, 16)])
def test_block_shapes_do_not_matter(blocks, launchers, monkeypatch):
    from fastattn.kernels.common import Launch

    monkeypatch.setattr(launchers, "pick", lambda kernel, *kind: (Launch(*blocks, 4, 1), False))
    Case(sq=75, sk=90, left=40, right=10, p=0.3, bias="f1ff", mask="11ff", heads=1).check()


@pytest.mark.parametrize(
    "options",
    [{"right": 0}, {"d": 40, "dv": 24}, {"packed": ([0, 30, 70], [0, 65, 80])}, {"lengths": [50, 0], "batch": 2}],
)
def test_descriptors(options, launchers, monkeypatch):
    """The TMA path, which the interpreter executes too."""
    pick, fit, used = launchers.pick, launchers.descriptors_fit, []
    monkeypatch.setattr(launchers, "pick", lambda *kind: (pick(*kind)[0], True))
    monkeypatch.setattr(launchers, "descriptors_fit", lambda *tensors: used.append(fit(*tensors)) or used[-1])
    Case(heads=4, kv_heads=2, dtype=torch.float16, **options).check()
    assert used == [True] * 3


@pytest.mark.parametrize("options", [{}, {"right": 0, "batch": 2}, {"packed": ([0, 20, 50], [0, 33, 90])}])
def test_dropout_mask_is_the_specified_one(options):
    case = Case(heads=2, sk=90, d=16, dv=128, p=0.4, **options)
    case.v = torch.zeros_like(case.v)  # each row of v selects single keys
    packed = case.cu_q is not None
    ends = list(zip(case.cu_q.tolist(), case.cu_k.tolist(), strict=True)) if packed else None
    for j in range(case.v.shape[2]):
        case.v[:, :, j, j - (max(k for _, k in ends if k <= j) if packed else 0)] = 1.0
    out, *_ = forward(*case.inputs(), *case.rest(), False)
    if not packed:
        i = torch.arange(out.shape[2], device=DEVICE)
        slab = torch.arange(out.shape[0] * 2, device=DEVICE).view(-1, 2, 1)
        keep = reference.philox_keep(case.rng, 0.4, i, slab, 90)
        visible = reference.attention_visible(
            out.shape[2], 90, causal=case.options[3] == 0 and "bottom_right", device=DEVICE
        )
        assert torch.equal(out[..., :90] != 0, keep & visible)
        return
    for b, ((q0, k0), (q1, k1)) in enumerate(itertools.pairwise(ends)):
        i, slab = torch.arange(q1 - q0, device=DEVICE), torch.arange(2 * b, 2 * b + 2, device=DEVICE)[:, None]
        keep = reference.philox_keep(case.rng, 0.4, i, slab, k1 - k0)
        assert torch.equal(out[0, :, q0:q1, : k1 - k0] != 0, keep)


EVERYTHING = {
    "batched": {"batch": 2, "heads": 2, "kv_heads": 1, "sq": 40, "left": 40, "right": 0, "p": 0.25, "sink": True,
                "bias": "1fff", "mask": "f11f", "lengths": [90, 30], "slopes": 2, "softcap": 3.0},
    "packed": {"packed": ([0, 30, 30, 50], [0, 20, 40, 70]), "heads": 2, "kv_heads": 1, "lengths": [20, 9, 25],
               "right": 0, "p": 0.25, "sink": True, "slopes": 1, "softcap": 3.0},
}  # fmt: skip


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("order", [("triton", "native"), ("native", "triton")])
def test_forward_and_backward_on_different_backends(order, name):
    reason = why_not("attention", "native", (DEVICE, torch.float32))
    if reason is not None:
        pytest.skip(f"the native backend cannot run here: {reason}")
    case = Case(**EVERYTHING[name])
    ops = torch.ops.fastattn
    saved = getattr(ops.attention_fwd, order[0])(*case.inputs(), *case.rest(), True)
    need_dbias = case.bias is not None
    args = case.do, case.dlse, *case.inputs()[:3], *saved, *case.inputs()[3:], *case.rest(), need_dbias, False
    exact_grads, plain_grads = case.expected(lambda t: t.double())[3], case.expected()[3]
    for got, exact, plain in zip(getattr(ops.attention_bwd, order[1])(*args), exact_grads, plain_grads, strict=True):
        if exact is not None:
            torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
            assert_accurate(got, exact, plain, factor=2 * BACKWARD)


def test_dropout_of_everything():
    case = Case(p=1.0, sq=20, sk=20)
    saved = forward(*case.inputs(), *case.rest(), True)
    grads = backward(case.do, None, *case.inputs()[:3], *saved, None, None, *case.rest(), False)
    assert not any(t.any() for t in (saved[0], *grads[:3]))


UNSEEN = {
    "mask": {"mask": "11ff"},
    "mask_keys": {"mask": "f11f", "batch": 2},
    "lengths": {"lengths": [33, 70], "batch": 2},
    "causal_top_left": {"right": 0, "top_left": True, "sq": 20},
    "window": {"left": 3, "right": 2, "sq": 10},
}


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # from numpy, in the interpreter
@pytest.mark.parametrize("name", UNSEEN)
def test_nan_in_unseen_keys_does_not_spread(name):
    case = Case(heads=1, **UNSEEN[name])
    if case.mask is not None:
        case.mask[..., 5] = case.mask[..., 70:] = False
    sq, sk, left, right, top_left = case.options[:5]
    visible = reference.attention_visible(
        sq, sk, mask=case.mask, causal="top_left" if top_left else False, window=(left, right),
        seqlens_k=case.lengths, device=DEVICE,
    )  # fmt: skip
    unseen = ~visible.any(-2).expand(case.q.shape[0], 1, sk)
    assert unseen.any()
    case.k[unseen] = math.nan
    case.v[unseen] = math.inf
    case.check()


def test_fully_masked_rows():
    case = Case(mask="ffff", heads=1, batch=2)
    case.mask[0, :, 3:50] = False
    case.mask[1] = False
    out, lse, low = forward(*case.inputs(), *case.rest(), True)
    rows = ~case.mask.any(-1)
    assert (lse[rows] == -math.inf).all()
    assert not out[rows].any()
    dq, dk, dv, *_ = backward(case.do, case.dlse, *case.inputs()[:3], out, lse, low, None, None, *case.rest(), False)
    assert not dq[rows].any()
    assert not dk[1].any()
    assert not dv[1].any()
    case.check()


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
def test_scores_far_below_zero_with_a_key_tail():
    """The zeros that pad the last block of keys have scores far above lse, so they are masked before exp."""
    case = Case(sk=70, heads=1, d=16)
    case.q = case.q.abs() + 20
    case.k = -case.k.abs() - 1
    _, lse, _ = forward(*case.inputs(), *case.rest(), False)
    assert lse.max() < -89
    case.check("reference")


def test_gradient_of_out_alone_and_of_lse_alone():
    case = Case(heads=1, sink=True)
    saved = forward(*case.inputs(), *case.rest(), True)
    args = (*case.inputs()[:3], *saved, *case.inputs()[3:], *case.rest(), False)
    zero = backward(case.do, torch.zeros_like(case.dlse), *args)
    none = backward(case.do, None, *args)
    for a, b in zip(zero, none, strict=True):
        assert torch.equal(a, b)
    zero = backward(torch.zeros_like(case.do), case.dlse, *args)
    none = backward(None, case.dlse, *args)
    for a, b in zip(zero, none, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("how", ["expanded", "transposed", "unaligned"])
def test_strides(how):
    case = Case(batch=2, heads=2, sq=40, sk=70, d=16)
    contiguous = [t.clone() for t in (case.q, case.k, case.v, case.do)]

    def restride(t):
        if how == "transposed":
            return t.mT.contiguous().mT
        wide = torch.zeros(*t.shape[:3], t.shape[3] + 5, dtype=t.dtype, device=t.device)
        wide[..., 3:-2] = t
        return wide[..., 3:-2]

    if how == "expanded":
        case.do = torch.full((), 0.5, device=DEVICE).expand_as(case.do)
        case.k = case.k[:1, :1].expand_as(case.k)
        case.v = case.v[:, :, :1].expand_as(case.v)
        contiguous[1:] = [t.contiguous() for t in (case.k, case.v, case.do)]
    else:
        case.q, case.k, case.v, case.do = map(restride, contiguous)
    saved = forward(*case.inputs(), *case.rest(), True)
    strided = backward(case.do, None, *case.inputs()[:3], *saved, None, None, *case.rest(), False)
    case.q, case.k, case.v, case.do = contiguous
    for got, want in zip(saved, forward(*case.inputs(), *case.rest(), True), strict=True):
        assert torch.equal(got, want)
    for got, want in zip(
        strided, backward(case.do, None, *case.inputs()[:3], *saved, None, None, *case.rest(), False), strict=True
    ):
        assert torch.equal(got, want)


def test_reruns_are_equal_bit_for_bit():
    case = Case(batch=2, heads=2, kv_heads=1, bias="1fff", p=0.1, sink=True, right=0, sq=66, sk=66)
    runs = []
    for _ in range(20 if DEVICE == "cuda" else 2):  # the interpreter runs one program after another
        saved = forward(*case.inputs(), *case.rest(), True)
        grads = backward(case.do, case.dlse, *case.inputs()[:3], *saved, *case.inputs()[3:], *case.rest(), True)
        runs.append((*saved, *grads))
    for results in zip(*runs, strict=True):
        assert all(torch.equal(result, results[0]) for result in results[1:])


def test_raw_ops_pass_opcheck():
    checks = ("test_schema", "test_faketensor")  # the other checks are about autograd, which raw ops do not have
    for options in (
        {"bias": "11f1", "sink": True, "bshd": True, "heads": 2, "kv_heads": 1, "dv": 8},
        {"packed": ([0, 3, 9], [0, 4, 18]), "slopes": 1, "p": 0.3},
    ):
        case = Case(d=16, **({"heads": 1, "sq": 7, "sk": 9} | options))
        arguments, need_dbias = (*case.inputs(), *case.rest()), case.bias is not None
        torch.library.opcheck(forward, (*arguments, need_dbias), test_utils=checks)
        saved = forward(*arguments, need_dbias)
        arguments = (case.do, case.dlse, *arguments[:3], *saved, *arguments[3:], need_dbias, False)
        torch.library.opcheck(torch.ops.fastattn.attention_bwd.triton, arguments, test_utils=checks)


def test_compiles_without_a_graph_break():
    def call(q, k, v, bias, sink, seqlens_k):
        return fastattn.attention(
            q * 2, k, v, bias=bias, sink=sink, seqlens_k=seqlens_k, causal=True, return_lse=True,
            backend="triton",
        )  # fmt: skip

    case = Case(batch=2, heads=4, kv_heads=2, sq=7, sk=9, d=16, bias="1fff", sink=True, lengths=[9, 5])
    leaves = [t.requires_grad_() for t in case.inputs()]
    torch._dynamo.reset()
    outcomes = []
    for function in (torch.compile(call, fullgraph=True, backend="aot_eager"), call):
        torch.manual_seed(0)
        out, lse = function(*leaves, case.lengths)
        loss = out.square().sum() + torch.where(lse.isfinite(), lse, 0.0).sum()
        outcomes.append((out, lse, torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*outcomes)


@pytest.mark.parametrize(("name", "dim"), [("q", 0), ("k", 2), ("v", 1), ("mask", 2), ("bias", 1), ("do", 2)])
def test_offsets_beyond_32_bits(name, dim):
    """One dimension is spread over 2^31 elements, in memory that is reserved but hardly touched."""
    sizes = {"batch": 3 if dim == 0 else 1, "heads": 3 if dim == 1 else 1}
    case = Case(**sizes, sq=3, sk=3, d=16, dtype=torch.float16, mask="ffff", bias="ffff")
    results = []
    for spread in (False, True):
        if spread:
            setattr(case, name, far(getattr(case, name), dim))
        saved = forward(*case.inputs(), *case.rest(), True)
        grads = backward(case.do, None, *case.inputs()[:3], *saved, *case.inputs()[3:], *case.rest(), True)
        results.append((*saved, *grads))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_head_dims_above_256_are_refused():
    q = torch.zeros(1, 1, 4, 264, device=DEVICE)
    with pytest.raises(ValueError, match="256"):
        fastattn.attention(q, q, q, backend="triton")
    assert "256" in fastattn.explain("attention", q, q, q)


def test_the_dispatcher_is_passed_by_only_where_nobody_looks_on():
    class Watched(torch.Tensor):
        pass

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    seen = []
    q, k, v = torch.randn(3, 1, 1, 4, 16, device=DEVICE)
    assert python_kernel("attention_fwd", "triton", q, k, v) is not None
    assert python_kernel("attention_fwd", "triton", q.as_subclass(Watched), k, v) is None
    assert python_kernel("attention_fwd", "native", q, k, v) is None
    expected = fastattn.attention(q, k, v, backend="triton")
    with Watch():
        got = fastattn.attention(q, k, v, backend="triton")
    assert forward in seen
    assert got.equal(expected)
