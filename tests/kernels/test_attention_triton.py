"""The Triton kernels of attention against the reference in fp64: on a GPU, or on CPU tensors in the interpreter.

The raw ops are called, so every case states exactly what the kernels get. In half of the cases the backward reads out
and lse of the reference, in the others those of the Triton forward: the forward may come from any backend.
"""

import itertools
import math

import pytest
import torch
from attention_cases import DEVICE, DIMS, Case, random_options
from memory_guard import far
from oracle import BACKWARD, assert_accurate

import fastattn
from fastattn import reference
from fastattn.ops._backends import why_not

_reason = fastattn.backends()[DEVICE]["triton"]
pytestmark = [
    pytest.mark.skipif(_reason != "available", reason=f"the Triton backend cannot run here: {_reason}"),
]

ALL, SCORES = DIMS, DIMS[1:]  # every dimension, and those of the scores of one batch entry
FEATURES = {
    "plain": {},
    "half": {"dtype": torch.float16, "sq": 129, "d": 64},
    # half precision without other features: the sums of the backward begin with -lse and -delta
    "half_longer_queries": {"dtype": torch.float16, "window_right": 0, "sq": 100, "sk": 40},
    "half_window_packed": {"dtype": torch.float16, "packed": ([0, 70, 70, 100], [0, 50, 60, 130]), "window_left": 20,
                           "window_right": 3},
    "half_mask_keys": {"dtype": torch.float16, "mask": ("batch", "keys"), "batch": 2, "heads": 4, "kv_heads": 2},
    "half_sink_and_empty_rows": {"dtype": torch.float16, "sink": True, "lengths": [0, 50], "batch": 2},
    "half_least_scale": {"dtype": torch.float16, "scale": 1e-38},
    "half_large_scale": {"dtype": torch.float16, "scale": 4.0},
    "one_query": {"sq": 1},
    "one_key": {"sk": 1, "window_right": 0},
    "bshd": {"bshd": True, "batch": 2},
    "causal": {"window_right": 0},
    "causal_top_left": {"window_right": 0, "top_left": True, "sq": 100, "sk": 40},
    "causal_longer_queries": {"window_right": 0, "sq": 100, "sk": 40},
    "window": {"window_left": 20, "window_right": 3, "sq": 140, "sk": 140},
    "window_causal_top_left": {"window_left": 5, "window_right": 0, "top_left": True, "sq": 30, "sk": 150},
    "window_left_only": {"window_left": 7},
    "gqa": {"heads": 4, "kv_heads": 2, "window_right": 0},
    "unequal_head_dims": {"d": 40, "dv": 24},
    "head_dim_8": {"d": 8, "dtype": torch.float16},
    "head_dim_200_256": {"d": 200, "dv": 256, "heads": 1, "sq": 40, "sk": 66},
    "mask_full": {"mask": ALL, "heads": 1},
    "mask_keys": {"mask": ("batch", "keys"), "batch": 2},
    "mask_half": {"mask": SCORES, "heads": 1, "dtype": torch.float16},
    "bias_full": {"bias": ALL},
    "bias_over_batch": {"bias": SCORES, "batch": 2, "heads": 1},
    "bias_keys": {"bias": ("batch", "keys"), "batch": 2},
    "bias_queries": {"bias": ("queries",)},
    "bias_scalar": {"bias": (), "window_right": 0},
    "bias_fp32_half_q": {"bias": SCORES, "bias_dtype": torch.float32, "dtype": torch.float16},
    "alibi": {"slopes": "heads", "window_right": 0},
    "alibi_per_batch": {"slopes": "batch", "batch": 2, "heads": 1},
    "softcap": {"softcap": 2.0},
    "sink": {"sink": True},
    "sink_and_empty_rows": {"sink": True, "lengths": [0, 50], "batch": 2},
    "dropout": {"dropout_p": 0.17},
    "dropout_causal": {"dropout_p": 0.5, "window_right": 0, "batch": 2, "heads": 1},
    "lengths": {"lengths": [0, 37, 90], "batch": 3, "heads": 1, "window_right": 0},
    "packed": {"packed": ([0, 70, 70, 100], [0, 50, 60, 130])},
    "packed_everything": {"packed": ([0, 70, 70, 100], [0, 50, 60, 130]), "lengths": [20, 10, 60], "window_right": 0,
                          "dropout_p": 0.2, "slopes": "batch", "sink": True},
    "negative_scale": {"scale": -0.2},
    "zero_scale": {"scale": 0.0},
    "no_keys": {"sk": 0},
    "no_queries": {"sq": 0, "bias": ("queries",)},
    "no_batch": {"batch": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_feature(name):
    Case(**FEATURES[name]).check("reference" if len(name) % 2 else "triton")


SEEDS = 500 if DEVICE == "cuda" else 60  # the interpreter takes half a second for one


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_random_combinations_cover_every_feature(dtype):
    used = set()
    for options in filter(lambda options: options["dtype"] == dtype, map(random_options, range(SEEDS))):
        used |= {name for name, value in options.items() if value not in (None, False, 0, -1)}
        used |= {"gqa"} if options["heads"] > options["kv_heads"] else set()
    features = "mask bias sink slopes dropout_p window_left window_right top_left softcap packed lengths bshd dv gqa"
    assert not set(features.split()) - used


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_combination(seed):
    options = random_options(seed)
    print(options)
    Case(**options).check(("reference", "triton")[seed % 2])


@pytest.mark.parametrize("visible", [1, 2])
@pytest.mark.parametrize(("sq", "seed"), [(1, 4), (1, 18), (9, 8), (9, 3)])
def test_dropout_with_few_visible_keys(sq, seed, visible):
    """The exact dq and dk of rows that see one key are 0, so all of them is error: that of the rounded out."""
    case = Case(heads=1, sq=sq, sk=9, d=40, dtype=torch.float16, dropout_p=0.1, seed=seed)
    away = (torch.arange(9) - torch.arange(sq)[:, None] - seed) % 9
    case.replace(mask=(away < visible)[None, None].to(DEVICE))
    case.check(("triton", "reference")[seed % 2])


@pytest.mark.parametrize("name", ["dq", "dk", "dv"])
def test_the_error_of_delta_excuses_no_other_one(name, monkeypatch):
    case = Case(heads=1, sq=9, sk=9, d=40, dtype=torch.float16, dropout_p=0.1, window_left=1, window_right=0)
    gradients = list(case.backward(case.forward()))
    which = ("dq", "dk", "dv").index(name)
    gradients[which] = gradients[which] * 1.01
    monkeypatch.setattr(case, "backward", lambda *_: gradients)
    with pytest.raises(AssertionError, match=name):
        case.check()


@pytest.fixture
def launchers():
    """The module with the plans of launches, to be patched: nothing that it planned before or in the test is kept."""
    from fastattn.kernels import attention_call

    attention_call.plan_for.cache_clear()
    yield attention_call
    attention_call.plan_for.cache_clear()


@pytest.mark.parametrize("blocks", [(32, 64), (64, 16), (128, 32)])
def test_block_shapes_do_not_matter(blocks, launchers, monkeypatch):
    from fastattn.kernels.common import Launch

    monkeypatch.setattr(launchers, "pick", lambda kernel, *kind: (Launch(*blocks, 4, 1), False))
    bias, mask = ("batch", "queries", "keys"), ("queries", "keys")
    Case(sq=75, sk=90, window_left=40, window_right=10, dropout_p=0.3, bias=bias, mask=mask, heads=1).check()


@pytest.fixture
def descriptors(launchers, monkeypatch):
    """The kernels load with TMA; the list is filled with the form and the descriptors of each launch that may."""
    pick, choose, used = launchers.pick, launchers.Start.choose, []
    monkeypatch.setattr(launchers, "pick", lambda *kind: (pick(*kind)[0], True))
    monkeypatch.setattr(launchers.Start, "choose", lambda *call: used.append(choose(*call)) or used[-1])
    return used


@pytest.mark.parametrize(("made_by_host", "options"), [  # those of the forward, of dk and dv, and of dq
    ((True, True, True), {"window_right": 0}),
    ((True, True, True), {"d": 40, "dv": 24, "batch": 2}),
    ((False, False, False), {"packed": ([0, 30, 70], [0, 65, 80])}),
    ((False, True, False), {"lengths": [50, 0], "batch": 2}),
    ((True, True, True), {"window_left": 20, "window_right": 5, "sq": 90}),
    ((False, True, False), {"window_left": 7, "window_right": 5, "sq": 40}),
    ((False, True, False), {"window_right": 0, "top_left": True, "sq": 40}),
    ((False, True, False), {"mask": ("batch", "keys"), "batch": 2}),
    ((False, True, False), {"window_left": 7, "sq": 40, "sk": 90, "lengths": [90, 3], "batch": 2}),
    ((False, False, False), {"window_left": 9, "window_right": 0, "packed": ([0, 30, 70], [0, 65, 80])}),
])  # fmt: skip
def test_descriptors(made_by_host, options, descriptors):
    """The TMA path, which the interpreter executes too."""
    Case(heads=4, kv_heads=2, dtype=torch.float16, **options).check()
    assert [form.TMA for form, *_ in descriptors] == [2 if host else 1 for host in made_by_host]
    assert [maps != [None, None] for _, *maps in descriptors] == list(made_by_host)


@pytest.mark.parametrize(("used", "options"), [
    ([2, 2, 2], {"window_right": 0}), ([0, 2, 0], {"lengths": [50, 0], "batch": 2}),
    ([0, 0, 0], {"packed": ([0, 30, 70], [0, 65, 80])}),
])  # fmt: skip
def test_a_device_that_makes_no_descriptors(used, options, descriptors, launchers, monkeypatch):
    from fastattn.kernels.common import HOST_MADE

    pick = launchers.pick
    monkeypatch.setattr(launchers, "pick", lambda *kind: (pick(*kind)[0], HOST_MADE.value))
    Case(heads=4, kv_heads=2, dtype=torch.float16, **options).check()
    assert [form.TMA for form, *_ in descriptors] == used


def test_descriptors_of_the_host_need_strides(descriptors):
    """An expanded tensor has strides of 0, which no descriptor of several dimensions may have."""
    case = Case(batch=2, dtype=torch.float16)
    case.replace(k=case.call.k[:1].expand(2, -1, -1, -1), v=case.call.v[:1].expand(2, -1, -1, -1))
    case.check()
    assert [form.TMA for form, *_ in descriptors] == [1, 2, 1]


@pytest.mark.parametrize("options", [{}, {"window_right": 0, "batch": 2}, {"packed": ([0, 20, 50], [0, 33, 90])}])
def test_dropout_mask_is_the_specified_one(options):
    case = Case(heads=2, sk=90, d=16, dv=128, dropout_p=0.4, **options)
    call = case.call
    call.v.zero_()  # each row of v selects single keys
    packed = call.cu_seqlens_q is not None
    ends = list(zip(call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist(), strict=True)) if packed else None
    for j in range(call.v.shape[2]):
        call.v[:, :, j, j - (max(k for _, k in ends if k <= j) if packed else 0)] = 1.0
    out, *_ = case.forward(need_low=False)
    if not packed:
        i = torch.arange(out.shape[2], device=DEVICE)
        slab = torch.arange(out.shape[0] * 2, device=DEVICE).view(-1, 2, 1)
        keep = reference.philox_keep(call.rng, 0.4, i, slab, 90)
        visible = reference.attention_visible(
            out.shape[2], 90, causal=call.window_right == 0 and "bottom_right", device=DEVICE
        )
        assert torch.equal(out[..., :90] != 0, keep & visible)
        return
    for b, ((q0, k0), (q1, k1)) in enumerate(itertools.pairwise(ends)):
        i, slab = torch.arange(q1 - q0, device=DEVICE), torch.arange(2 * b, 2 * b + 2, device=DEVICE)[:, None]
        keep = reference.philox_keep(call.rng, 0.4, i, slab, k1 - k0)
        assert torch.equal(out[0, :, q0:q1, : k1 - k0] != 0, keep)


EVERYTHING = {
    "batched": {"batch": 2, "heads": 2, "kv_heads": 1, "sq": 40, "window_left": 40, "window_right": 0,
                "dropout_p": 0.25, "sink": True, "bias": SCORES, "mask": ("batch", "keys"), "lengths": [90, 30],
                "slopes": "batch", "softcap": 3.0},
    "packed": {"packed": ([0, 30, 30, 50], [0, 20, 40, 70]), "heads": 2, "kv_heads": 1, "lengths": [20, 9, 25],
               "window_right": 0, "dropout_p": 0.25, "sink": True, "slopes": "heads", "softcap": 3.0},
}  # fmt: skip


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("order", [("triton", "native"), ("native", "triton")])
def test_forward_and_backward_on_different_backends(order, name):
    reason = why_not("attention", "native", (DEVICE, torch.float32))
    if reason is not None:
        pytest.skip(f"the native backend cannot run here: {reason}")
    case = Case(**EVERYTHING[name])
    grads = case.backward(case.forward(order[0]), order[1])
    exact_grads, plain_grads = case.expected(torch.float64)[3], case.expected()[3]
    for got, exact, plain in zip(grads, exact_grads, plain_grads, strict=True):
        if exact is not None:
            torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
            assert_accurate(got, exact, plain, factor=2 * BACKWARD)


def test_dropout_of_everything():
    case = Case(dropout_p=1.0, sq=20, sk=20)
    case.dlse = None
    saved = case.forward()
    assert not any(t.any() for t in (saved[0], *case.backward(saved)[:3]))


UNSEEN = {
    "mask": {"mask": ("queries", "keys")},
    "mask_keys": {"mask": ("batch", "keys"), "batch": 2},
    "lengths": {"lengths": [33, 70], "batch": 2},
    "causal_top_left": {"window_right": 0, "top_left": True, "sq": 20},
    "window": {"window_left": 3, "window_right": 2, "sq": 10},
}


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # from numpy, in the interpreter
@pytest.mark.parametrize("name", UNSEEN)
def test_nan_in_unseen_keys_does_not_spread(name):
    case = Case(heads=1, **UNSEEN[name])
    call = case.call
    if call.mask is not None:
        call.mask[..., 5] = call.mask[..., 70:] = False
    visible = reference.attention_visible(
        call.max_seqlen_q, call.max_seqlen_k, mask=call.mask, causal="top_left" if call.top_left else False,
        window=(call.window_left, call.window_right), seqlens_k=call.seqlens_k, device=DEVICE,
    )  # fmt: skip
    unseen = ~visible.any(-2).expand(call.q.shape[0], 1, call.max_seqlen_k)
    assert unseen.any()
    call.k[unseen] = math.nan
    call.v[unseen] = math.inf
    case.check()


def test_fully_masked_rows():
    case = Case(mask=ALL, heads=1, batch=2)
    case.call.mask[0, :, 3:50] = False
    case.call.mask[1] = False
    out, lse, _ = saved = case.forward()
    rows = ~case.call.mask.any(-1)
    assert (lse[rows] == -math.inf).all()
    assert not out[rows].any()
    dq, dk, dv, *_ = case.backward(saved)
    assert not dq[rows].any()
    assert not dk[1].any()
    assert not dv[1].any()
    case.check()


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
def test_scores_far_below_zero_with_a_key_tail():
    """The zeros that pad the last block of keys have scores far above lse, so they are masked before exp."""
    case = Case(sk=70, heads=1, d=16)
    case.replace(q=case.call.q.abs() + 20, k=-case.call.k.abs() - 1)
    _, lse, _ = case.forward(need_low=False)
    assert lse.max() < -89
    case.check("reference")


def test_gradient_of_out_alone_and_of_lse_alone():
    case = Case(heads=1, sink=True)
    saved, do, dlse = case.forward(), case.do, case.dlse
    for with_zeros, with_none in (
        ((do, torch.zeros_like(dlse)), (do, None)),
        ((torch.zeros_like(do), dlse), (None, dlse)),
    ):
        case.do, case.dlse = with_zeros
        zero = case.backward(saved)
        case.do, case.dlse = with_none
        for a, b in zip(zero, case.backward(saved), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("how", ["expanded", "transposed", "unaligned"])
def test_strides(how):
    case = Case(batch=2, heads=2, sq=40, sk=70, d=16)
    case.dlse = None
    contiguous = [t.clone() for t in (*case.call[:3], case.do)]

    def restride(t):
        if how == "transposed":
            return t.mT.contiguous().mT
        wide = torch.zeros(*t.shape[:3], t.shape[3] + 5, dtype=t.dtype, device=t.device)
        wide[..., 3:-2] = t
        return wide[..., 3:-2]

    if how == "expanded":
        q, k, v = case.call[:3]
        case.replace(k=k[:1, :1].expand_as(k), v=v[:, :, :1].expand_as(v))
        case.do = torch.full((), 0.5, device=DEVICE).expand_as(case.do)
        contiguous[1:] = [t.contiguous() for t in (case.call.k, case.call.v, case.do)]
    else:
        q, k, v, case.do = map(restride, contiguous)
        case.replace(q=q, k=k, v=v)
    saved = case.forward()
    strided = case.backward(saved)
    q, k, v, case.do = contiguous
    case.replace(q=q, k=k, v=v)
    for got, want in zip((*saved, *strided), (*case.forward(), *case.backward(saved)), strict=True):
        assert torch.equal(got, want)


def test_reruns_are_equal_bit_for_bit():
    case = Case(batch=2, heads=2, kv_heads=1, bias=SCORES, dropout_p=0.1, sink=True, window_right=0, sq=66, sk=66)
    runs = []
    for _ in range(20 if DEVICE == "cuda" else 2):  # the interpreter runs one program after another
        saved = case.forward()
        runs.append((*saved, *case.backward(saved)))
    for results in zip(*runs, strict=True):
        assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize(("name", "dim"), [("q", 0), ("k", 2), ("v", 1), ("mask", 2), ("bias", 1), ("do", 2)])
def test_offsets_beyond_32_bits(name, dim):
    """One dimension is spread over 2^31 elements, in memory that is reserved and mostly untouched."""
    sizes = {"batch": 3 if dim == 0 else 1, "heads": 3 if dim == 1 else 1}
    case = Case(**sizes, sq=3, sk=3, d=16, dtype=torch.float16, mask=ALL, bias=ALL)
    case.dlse = None
    results = []
    for spread in (False, True):
        if spread and name == "do":
            case.do = far(case.do, dim)
        elif spread:
            case.replace(**{name: far(getattr(case.call, name), dim)})
        saved = case.forward()
        results.append((*saved, *case.backward(saved)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
