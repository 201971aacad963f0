"""The building blocks of the kernels for Hopper, each against an independent model. See tests/support/sm90_units.cu.

On a GPU of compute capability 9.0 the blocks themselves run. On other machines their software versions in
tests/support/emulated run, with the same index functions. The models here are written from the PTX ISA and share no
code with either.
"""

import ctypes
import itertools
import random

import pytest
import torch
from hopper import DEVICE, HOPPER
from processes import assert_fails
from sm90_units import emulated, on_hardware


@pytest.fixture(scope="module")
def units():
    return ctypes.CDLL(on_hardware() if HOPPER else emulated())


def call(function, *arguments):
    """Call a unit with tensors and numbers, and check that its error code is 0."""
    converted = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
    assert function(*converted) == 0
    if HOPPER:
        torch.cuda.synchronize()


def integers(*shape, seed=0):
    """Small integers in bf16, whose products and sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).to(DEVICE, torch.bfloat16)


def test_which_element_a_thread_holds(units):
    """PTX ISA, fragments of .m64nNk16: groupID = lane / 4, threadID_in_group = lane % 4."""
    found = (ctypes.c_int * 5)()
    accumulators, operands = set(), set()
    for thread in range(128):
        warp, group, in_group = thread // 32, thread % 32 // 4, thread % 4
        for i in range(64):
            units.unit_index(thread, i, found)
            row = warp * 16 + group + (8 if i % 4 >= 2 else 0)
            assert tuple(found[:2]) == (row, 8 * (i // 4) + 2 * in_group + i % 2)
            accumulators.add(tuple(found[:2]))
            # a0..a7, two per register: rows group, group + 8, group, group + 8; the last four are 8 columns further
            if i < 4:
                a_row, a_col = warp * 16 + group + 8 * (i in (1, 3)), 2 * in_group + 8 * (i >= 2)
                assert tuple(found[2:5]) == (a_row, a_col, a_col + 1)
                operands.update({(found[2], found[3]), (found[2], found[4])})
    assert len(accumulators) == 64 * 128  # every element is held by one thread
    assert len(operands) == 64 * 16


def swizzle(address, panel):
    """Rows of 128 bytes: bits 4 to 6 of a byte address xor bits 7 to 9; of 64 bytes: bits 4 and 5 xor bits 7 and 8."""
    return address ^ (address >> 3 & {64: 0b1110000, 32: 0b110000}[panel])


# columns of a tile and of its panels: whole swizzle atoms, of 64 columns, or for head dim 96 of 32
PANELS = pytest.mark.parametrize(("cols", "panel"), [(128, 64), (96, 32)])


@PANELS
@pytest.mark.parametrize("rows", [64, 80, 112, 128, 176, 192])
def test_where_an_element_of_a_tile_lies(units, rows, cols, panel):
    places = [(row, col) for row in range(rows) for col in range(cols)]
    offsets = [units.unit_tile_offset(row, col, rows, panel) for row, col in places]
    linear = ((col // panel * rows + row) * 2 * panel + col % panel * 2 for row, col in places)
    assert offsets == [swizzle(address, panel) for address in linear]
    assert sorted(offsets) == list(range(0, rows * cols * 2, 2))
    for col in range(0, cols, 8):  # eight rows of a column of 16-byte chunks use all 32 banks
        assert len({units.unit_tile_offset(row, col, rows, panel) % 128 // 16 for row in range(8)}) == 8


@PANELS
@pytest.mark.parametrize("rows", [64, 96, 128])
def test_where_a_tile_has_the_elements_of_a_thread(units, rows, cols, panel):
    found = (ctypes.c_int * 5)()
    for thread in range(128):
        for i in range(cols // 2):
            units.unit_index(thread, i, found)
            offset = units.unit_accumulator_offset(thread, i, rows, panel)
            assert offset == units.unit_tile_offset(found[0], found[1], rows, panel)


@PANELS
@pytest.mark.parametrize("rows", [64, 80, 112, 128, 176, 192])
def test_descriptors_address_the_tile(units, rows, cols, panel):
    """The canonical layouts of the PTX ISA, with T = 8 elements of 16 bits and a row of W of them in an atom (8, or 4):

    K-major ((8,m),(T,2k)):((W T,SBO),(1,T)), MN-major ((T,W,m),(8,k)):((1,T,LBO),(W T,SBO)). An MN-major matrix has
    m whole atoms, so the columns of a tile must be a multiple of W T.
    """
    units.unit_descriptor.restype = ctypes.c_uint64
    units.unit_descriptor.argtypes = [ctypes.c_bool, ctypes.c_uint32, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    tile, width = 3 * 1024, panel // 8
    assert cols % (8 * width) == 0

    def fields(k_is_inner, step):
        bits = units.unit_descriptor(k_is_inner, tile, rows, step, panel)
        assert bits >> 62 == {64: 1, 32: 2}[panel]
        assert bits >> 46 & 0xFFFF == 0
        return tuple((bits >> shift & 0x3FFF) * 16 for shift in (0, 16, 32))

    for step in range(cols // 16):
        start, _, stride = fields(True, step)
        for mn in range(rows):
            for k in range(16):
                address = swizzle(start + mn % 8 * 16 * width + mn // 8 * stride + k * 2, panel)
                assert address == tile + units.unit_tile_offset(mn, step * 16 + k, rows, panel)
    for step in range(rows // 16):
        start, leading, stride = fields(False, step)
        for mn in range(cols):
            for k in range(16):
                chunk = mn // 8 % width * 16 + mn // 8 // width * leading
                address = swizzle(start + mn % 8 * 2 + chunk + k % 8 * 16 * width + k // 8 * stride, panel)
                assert address == tile + units.unit_tile_offset(step * 16 + k, mn, rows, panel)


@PANELS
@pytest.mark.parametrize("adds", [False, True])
# the last one extends past the end: it reads zeros and is not written
@pytest.mark.parametrize("at", [(0, 0, 0), (64, 2, 1), (90, 1, 0)])
def test_tma_loads_swizzled_and_stores_or_adds_back(units, at, adds, cols, panel):
    batch, heads, rows = 2, 3, 100
    source = integers(batch, rows, heads, cols)
    target = torch.full_like(source, 9)
    dump = torch.empty(64 * cols, dtype=torch.bfloat16, device=DEVICE)
    call(units.unit_tma, source, target, ctypes.c_bool(adds), dump, batch, heads, rows, cols, *at)
    row, head, index = at
    expected = torch.zeros(64, cols, dtype=torch.bfloat16)
    there = source[index, row : row + 64, head].cpu()
    expected[: len(there)] = there
    places = [
        [swizzle((c // panel * 64 + r) * 2 * panel + c % panel * 2, panel) // 2 for c in range(cols)] for r in range(64)
    ]
    assert torch.equal(dump.cpu()[torch.tensor(places)], expected)
    after = torch.full_like(source, 9).cpu()
    after[index, row : row + 64, head] = there + 9 if adds else there
    assert torch.equal(target.cpu(), after)


def test_bulk_reduce_adds_what_every_block_brings(units):
    values = integers(512).float()
    out = torch.arange(512, device=DEVICE).float()
    call(units.unit_reduce, values, out, 40)
    assert torch.equal(out, torch.arange(512, device=DEVICE) + 40 * values)


def test_maps_that_were_made_before_are_those_that_would_be_made_now(units):
    """More maps than the cache holds, in an order that hits kept and evicted ones. Invalid ones are not kept."""
    memory = torch.zeros(2**16, dtype=torch.bfloat16, device=DEVICE)
    rng = random.Random(0)
    calls = [
        (16 * rng.randrange(4), 8192, 128 * rng.choice((1, 16)), 128 * rng.choice((1, 4)), 2, 4, rng.choice((8, 16)),
         rng.choice((64, 96, 128)), rng.choice((64, 128)), rng.choice((1, 2)))
        for _ in range(300)
    ]  # fmt: skip
    assert len(set(calls)) > 100
    bad = (8, *calls[0][1:])  # not at a multiple of 16 bytes
    for arguments in (*calls, bad, calls[0], bad, *calls[:100], *reversed(calls)):
        code = units.unit_map(ctypes.c_void_p(memory.data_ptr()), (ctypes.c_int64 * 10)(*arguments))
        assert (code > 0) if arguments == bad else (code == 0), arguments


@pytest.mark.parametrize(("form", "n", "k"), [
    ("abt", 64, 64), ("abt", 64, 96), ("abt", 64, 128), ("abt", 64, 256), ("abt", 80, 256), ("abt", 112, 192),
    ("abt", 128, 64), ("abt", 128, 128), ("abt", 176, 128), ("ab", 64, 64), ("ab", 64, 128), ("ab", 96, 128),
    ("ab", 128, 64), ("ab", 128, 128), ("ab", 128, 176), ("ab", 192, 112), ("ab", 256, 64), ("ab", 256, 80),
    ("atb", 64, 128), ("atb", 96, 128),
])  # fmt: skip
def test_wgmma_multiplies(units, form, n, k):
    a = integers(*((k, 64) if form == "atb" else (64, k)))
    b = integers(*((n, k) if form == "abt" else (k, n)), seed=1)
    d = torch.full((64, n), torch.nan, device=DEVICE)
    call(units.unit_wgmma, a, b, d, n, k, form.encode())
    expected = (a.T if form == "atb" else a).float() @ (b.T if form == "abt" else b).float()
    assert torch.equal(d, expected)


def test_pipe_roles_and_named_barriers(units):
    values = torch.randn(400, device=DEVICE)
    out = torch.zeros_like(values)
    call(units.unit_pipe, values, out, values.numel())
    torch.testing.assert_close(out, 6 * values)


@pytest.mark.parametrize("groups", [2, 3])
def test_warpgroups_take_turns(units, groups):
    out = torch.full((7 * groups,), -1, dtype=torch.int32, device=DEVICE)
    call(units.unit_turns, out, groups, 7, 0)
    assert out.tolist() == [*range(groups)] * 7


SHAPES = [  # batch, n_heads, n_kv_heads, seqlen_q, seqlen_k, left, right, top_left
    (2, 4, 2, 700, 900, 2**29, 0, 0), (1, 3, 1, 900, 300, 2**29, 0, 0), (2, 2, 2, 300, 900, 2**29, 0, 1),
    (1, 2, 1, 1000, 1000, 100, 30, 0), (3, 2, 1, 129, 640, 0, 0, 0), (1, 1, 1, 1, 5000, 2**29, 2**29, 0),
    (40, 16, 4, 257, 257, 2**29, 0, 0),
]  # fmt: skip


# kernel: whether tiles consist of keys, their rows, and the block of the other side
TILES = {
    "forward 64": (False, 192, 128), "forward 128, dq": (False, 128, 128), "forward 192": (False, 128, 112),
    "forward 128, full": (False, 128, 176), "forward 256": (False, 128, 80), "dk and dv": (True, 128, 64),
}  # fmt: skip


def schedule(units, shape, kind, head_dim=128, with_dq=False):
    """(tiles, 7): batch, head, row, and begin, full_begin, full_end, end of the blocks of the other side."""
    room = 10_000
    found = (ctypes.c_int * (7 * room))()
    of_keys, rows, block = TILES[kind]
    count = units.unit_tiles(
        (ctypes.c_int * 8)(*shape), ctypes.c_bool(of_keys), ctypes.c_bool(with_dq), rows, block, head_dim, found, room
    )
    assert count <= room
    return torch.tensor(found[: 7 * count]).view(count, 7)


@pytest.mark.parametrize("kind", TILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_schedule_visits_every_tile_once_and_every_visible_pair(shape, kind, units):
    batch, n_heads, n_kv_heads, seqlen_q, seqlen_k, left, right, top_left = shape
    of_keys, size, block = TILES[kind]
    tiles = schedule(units, shape, kind)
    length, heads = (seqlen_k, n_kv_heads) if of_keys else (seqlen_q, n_heads)
    assert len({tuple(t) for t in tiles[:, :3].tolist()}) == len(tiles) == batch * heads * -(-length // size)
    off = 0 if top_left else seqlen_k - seqlen_q
    i, j = torch.arange(seqlen_q)[:, None], torch.arange(seqlen_k)
    visible = (j <= i + off + right) & (j >= i + off - left)
    visible = visible.T if of_keys else visible
    for row, begin, full_begin, full_end, end in {tuple(t) for t in tiles[:, 2:].tolist()}:
        rows = visible[row : row + size]
        some = [rows[:, n : n + block].any().item() for n in range(0, rows.shape[1], block)]
        every = [
            rows[:, n : n + block].all().item() and n + block <= rows.shape[1] for n in range(0, rows.shape[1], block)
        ]
        assert all(begin <= n < end for n, seen in enumerate(some) if seen)
        assert (begin == end) == (not any(some))
        assert all(every[full_begin:full_end])
        assert sum(every[begin:end]) == full_end - full_begin  # no block is masked needlessly


@pytest.mark.parametrize("size", [128, 192])
@pytest.mark.parametrize("lengths", [(), (0,), (300, 0, 0, 128, 1), (128,) * 40, (1,) * 300, (5000,)])
def test_tiles_of_packed_rows(lengths, size, units):
    """Each row is in one tile. The number of tiles follows from rows and sequences, not from the longest one."""
    ends = [0, *itertools.accumulate(lengths)]
    for behind in (0, 1, 500):
        total, room = ends[-1] + behind, 10_000
        found = (ctypes.c_int * (2 * room))()
        count = units.unit_packed_tiles((ctypes.c_int32 * len(ends))(*ends), len(lengths), total, size, found, room)
        assert count == total // size + len(lengths) + 1
        rows = []
        for sequence, within in zip(found[: 2 * count : 2], found[1 : 2 * count : 2], strict=True):
            first = ends[sequence] + within * size
            rows += range(first, min(first + size, [*ends, total][sequence + 1]))
        assert rows == [*range(total)]


@pytest.mark.parametrize("kind", ["forward 128, dq", "dk and dv"])
def test_schedule_takes_the_longest_tiles_of_a_set_first_and_balances_the_blocks(kind, units):
    shape = (4, 16, 16, 4096, 4096, 2**29, 0, 0)  # causal
    tiles = schedule(units, shape, kind)
    work = (tiles[:, 6] - tiles[:, 3]).tolist()
    heads = (tiles[:, 0] * 16 + tiles[:, 1]).view(4, 512)
    for group in range(4):  # 16 heads of 4096 positions are 32 MiB of keys and values
        assert set(heads[group].tolist()) == set(range(16 * group, 16 * group + 16))
    step = 128 // TILES[kind][2]  # a tile sees this many blocks less than the one before
    assert work == 4 * [length for length in range(32 * step, 0, -step) for _ in range(16)]
    done_at = [0] * 132  # 132 multiprocessors, each of which takes the next tile when it is idle
    for length in work:
        done_at[done_at.index(min(done_at))] += length
    assert max(done_at) <= 1.02 * sum(work) / 132
    if kind == "dk and dv":  # with the sums of dq, 8 heads are 32 MiB
        tiles = schedule(units, shape, kind, with_dq=True)
        heads = (tiles[:, 0] * 16 + tiles[:, 1]).view(8, 256)
        assert [sorted(set(group.tolist())) for group in heads] == [[*range(8 * n, 8 * n + 8)] for n in range(8)]


@pytest.mark.parametrize(("shape", "lengths"), [
    # batch, n_heads, n_kv_heads, seqlen_q, seqlen_new, capacity, left, right, splits
    ((3, 8, 2, 1, 0, 1000, 2**29, 0, 7), (1000, 64, 1)), ((2, 4, 4, 16, 2, 500, 2**29, 0, 3), (0, 498)),
    ((2, 40, 2, 16, 0, 3000, 2**29, 0, 5), (3000, 77)), ((1, 2, 1, 4, 0, 5000, 300, 0, 4), (4000,)),
    ((2, 1, 1, 5, 0, 700, 2**29, 2**29, 128), (700, 3)),
])  # fmt: skip
def test_splits_of_a_cache_share_every_visible_block_evenly(shape, lengths, units):
    batch, n_heads, n_kv_heads, seqlen_q, seqlen_new, capacity, left, right, splits = shape
    room = 10_000
    found = (ctypes.c_int * (6 * room))()
    count = units.unit_decode_tiles((ctypes.c_int * 9)(*shape), (ctypes.c_int32 * batch)(*lengths), found, room)
    group = n_heads // n_kv_heads
    rows = range(0, group * seqlen_q, 64)
    assert count == splits * batch * n_kv_heads * len(rows) <= room
    shares = {}
    for split, b, kv_head, row, begin, end in torch.tensor(found[: 6 * count]).view(count, 6).tolist():
        shares.setdefault((b, kv_head, row), {})[split] = range(begin, end)
    assert set(shares) == {(b, h, row) for b in range(batch) for h in range(n_kv_heads) for row in rows}
    for (b, _, row), share in shares.items():
        length = min(lengths[b] + seqlen_new, capacity)
        off = length - seqlen_q
        seen = {
            key // 64
            for place in range(row, min(row + 64, group * seqlen_q))
            for key in range(max(0, place // group + off - left), min(length, place // group + off + right + 1))
        }
        assert sorted(n for part in share.values() for n in part) == sorted(seen)
        assert sorted(share) == list(range(splits))
        sizes = [len(part) for part in share.values()]
        assert max(sizes) - min(sizes) <= 1


def test_the_number_of_splits_is_that_of_the_triton_kernel(units):
    decode = pytest.importorskip("fastattn.kernels.attention_decode", reason="Triton is not installed")
    for tiles in (1, 2, 7, 8, 32, 100, 131, 211, 500):
        for key_blocks in (1, 4, 5, 16, 100, 1000):
            for slots in (4, 132, 264):
                expected = decode.choose_splits(tiles, key_blocks, slots)
                assert units.unit_choose_splits(tiles, key_blocks, slots, decode.MAX_SPLITS) == expected


# enum Plant in tests/support/sm90_units.cu: (call, message). Without a message, which rule sees the fault first depends
# on what other threads do.
PLANTED = {
    "PLANT_NO_FENCE": ("abt", "reached without fence_async"),
    "PLANT_WRITE_IN_FLIGHT": ("abt", "shared memory changed while a product read it"),
    "PLANT_USE_BEFORE_WAIT": ("abt", "an accumulator was written while a product ran"),
    "PLANT_OPERAND_IN_FLIGHT": ("ab", "an operand in registers was written while a product read it"),
    "PLANT_PART_OF_AN_ATOM": ("ab 96", "a product that ends within a swizzle atom"),
    "PLANT_NO_READ": ("reduce", "a block ended while copies were running"),
    "PLANT_WRITE_UNDER_COPY": ("reduce", "shared memory changed while a copy read it"),
    "PLANT_NO_EMPTY": ("pipe", ""),
}
CALLS = {
    "abt": "units.unit_wgmma(ones, ones, (ctypes.c_float * 64**2)(), 64, 64, b'abt')",
    "ab": "units.unit_wgmma(ones, ones, (ctypes.c_float * 64**2)(), 64, 64, b'ab')",
    "ab 96": "x = (ctypes.c_uint16 * 2**14)(); units.unit_wgmma(x, x, (ctypes.c_float * 6144)(), 96, 128, b'ab')",
    "reduce": "units.unit_reduce(values, (ctypes.c_float * 512)(), 1)",
    "pipe": """
units.unit_pipe(values, out, 400)
assert list(out) == [6 * value for value in range(400)], "wrong numbers"
""",
}
TURNS = {  # enum Fault in tests/support/sm90_units.cu
    "no pass": (1, "nothing is left that could end a wait"),
    "pass twice": (2, "a thread arrives twice at a named barrier"),
    "two counts": (3, "a named barrier with two numbers of threads"),
    "no end": (4, "an arrival at a named barrier that nobody waited for"),
    "half a vote": (5, ""),
    "trap": (6, "a trap"),
}


def assert_found(library, statement, message):
    """The process in which the emulation runs the statement ends with an error."""
    script = f"""
import ctypes
units = ctypes.CDLL({library!r})
ones = (ctypes.c_uint16 * 64**2)(*[0x3F80] * 64**2)  # in bf16
values, out = (ctypes.c_float * 512)(*range(512)), (ctypes.c_float * 400)()
{statement}
"""
    assert_fails(script, message=message)


@pytest.mark.skipif(HOPPER, reason="about the emulation")
@pytest.mark.parametrize("fault", PLANTED)
def test_the_emulation_finds_what_hardware_would_not_forgive(fault):
    unit, message = PLANTED[fault]
    number = [*PLANTED].index(fault) + 1
    assert_found(emulated(), f"units.unit_plant({number}); {CALLS[unit].strip()}", message)


@pytest.mark.skipif(HOPPER, reason="about the emulation")
@pytest.mark.parametrize("fault", TURNS)
def test_the_emulation_finds_faults_of_named_barriers_and_votes(fault):
    number, message = TURNS[fault]
    assert_found(emulated(), f"units.unit_turns((ctypes.c_int * 64)(), 2, 4, {number})", message)
