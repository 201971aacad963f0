"""attention_decode against F.scaled_dot_product_attention on the same cache, with 1 to 16 new queries per sequence.

nbytes is the size of the cache, which must be read. In the same rounds, "read" sums as many bytes, and "copy" moves as
many, of which half are read and half are written.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE

import fastattn

# batch, query heads, key heads, keys, head_dim
SHAPES = (
    [(1, 32, 32, 4096, 128), (1, 32, 8, 8192, 128), (8, 32, 8, 2048, 128), (1, 8, 8, 512, 64)]
    if DEVICE == "cpu"
    else [(1, 32, 8, 16384, 128), (16, 32, 8, 8192, 128), (64, 32, 8, 1024, 128), (1, 16, 16, 1024, 64)]
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
PAGE_SIZE = 64

shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def inputs(shape, dtype, seqlen_q=1):
    batch, n_heads, n_kv_heads, seqlen, head_dim = shape
    torch.manual_seed(0)
    q = torch.randn(batch, n_heads, seqlen_q, head_dim, dtype=dtype, device=DEVICE)
    k, v = torch.randn(2, batch, n_kv_heads, seqlen, head_dim, dtype=dtype, device=DEVICE)
    return q, k, v, torch.full((batch,), seqlen, dtype=torch.int32, device=DEVICE)


def ours(call):
    """The candidates of fastattn: call(backend) with the automatic choice, or on a GPU with every usable backend."""
    if DEVICE == "cpu":
        return {"fastattn": lambda: call(None)}
    candidates = {}
    for name in ("native", "triton"):
        try:
            call(name)
        except Exception as error:  # the row is missing from the table, and the log says why
            print(f"{name} left out: {str(error).splitlines()[0]}")
            continue
        candidates[f"fastattn {name}"] = lambda name=name: call(name)
    return candidates


def side_by_side(compare, q, k, v, candidates):
    options = {"enable_gqa": q.shape[1] != k.shape[1]}
    if q.shape[2] > 1:  # the last query sees all keys, the one before it one less
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=DEVICE)
        options["attn_mask"] = visible.tril(k.shape[2] - q.shape[2])
    candidates = {"torch": lambda: F.scaled_dot_product_attention(q, k, v, **options)} | candidates
    nbytes = k.nbytes + v.nbytes
    whole = torch.ones(nbytes // 4, device=DEVICE)
    source, target = whole.chunk(2)
    compare(
        candidates | {"read": whole.sum, "copy": lambda: target.copy_(source)},
        verify=candidates,
        tolerance=TOLERANCE[q.dtype],
        nbytes=nbytes,
    )


@dtypes
@shapes
def test_contiguous(compare, shape, dtype):
    q, k, v, lengths = inputs(shape, dtype)
    side_by_side(
        compare, q, k, v,
        ours(lambda backend: fastattn.attention_decode(q, k, v, cache_seqlens=lengths, backend=backend)),
    )  # fmt: skip


@dtypes
@pytest.mark.parametrize("seqlen_q", [4, 16])
def test_several_queries(compare, seqlen_q, dtype):
    q, k, v, lengths = inputs(SHAPES[2], dtype, seqlen_q)
    side_by_side(compare, q, k, v, {"fastattn": lambda: fastattn.attention_decode(q, k, v, cache_seqlens=lengths)})


@dtypes
@pytest.mark.parametrize("seqlen_q", [1, 16])
def test_paged(compare, seqlen_q, dtype):
    q, k, v, lengths = inputs(SHAPES[2], dtype, seqlen_q)
    batch, n_kv_heads, seqlen, head_dim = k.shape
    pages = seqlen // PAGE_SIZE
    order = torch.randperm(batch * pages, device=DEVICE)
    caches = []
    for t in (k, v):
        split = t.view(batch, n_kv_heads, pages, PAGE_SIZE, head_dim).transpose(1, 2).flatten(0, 1)
        caches.append(torch.empty_like(split, memory_format=torch.contiguous_format))
        caches[-1][order] = split
    table = order.view(batch, pages).int()

    def paged(backend):
        return fastattn.attention_decode(q, *caches, cache_seqlens=lengths, block_table=table, backend=backend)

    side_by_side(compare, q, k, v, ours(paged))


@dtypes
def test_append(compare, dtype):
    """A step of generation: the newest key and value go into the cache first, in PyTorch by index_copy_."""
    q, k, v, lengths = inputs(SHAPES[1], dtype)
    new_k, new_v = k[:, :, -1:].clone(), v[:, :, -1:].clone()
    last, before = (lengths[:1] - 1).long(), lengths - 1  # one row of the cache, the same in each sequence
    gqa = q.shape[1] != k.shape[1]

    def torch_step():
        k.index_copy_(2, last, new_k)
        v.index_copy_(2, last, new_v)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)

    compare(
        {"torch": torch_step}
        | ours(
            lambda backend: fastattn.attention_decode(q, k, v, k=new_k, v=new_v, cache_seqlens=before, backend=backend)
        ),
        tolerance=TOLERANCE[dtype],
        nbytes=k.nbytes + v.nbytes,
    )
