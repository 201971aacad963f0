// Matrix product in bfloat16 with the tiles of AMX: c (m, n) = a (m, k) · b (k, n), plus a bias per column or plus the
// old content of c. Sums are in fp32 and are rounded once. The file is compiled for AMX only.
//
// A tile is 16 rows of 16 slots (1 KiB). A slot is two bf16 that follow each other along k. A block of c is 2 x 2
// tiles. It is summed over all of k in the order of k, so the result does not depend on the number of threads. b is
// packed into tiles first. So is a, unless its tiles can be loaded in place.
#include "gemm_tiles.h"
#include "lanes.h"

namespace fastattn {
namespace {

constexpr int64_t kTileFloats = kVec * kVec;
constexpr int64_t kTileDepth = 2 * kVec;

const BF16* as_bf16(const uint16_t* p) {
  return reinterpret_cast<const BF16*>(p);
}

// 16 rows of 16 slots
struct Tile {
  Vec row[kVec];

  void store(float* dst) const {
    for (int r = 0; r < kVec; ++r) {
      row[r].store(dst + r * kVec);
    }
  }
};

// Loads the first `rows` of 16 rows and the first `elements` of their 32 elements. The rest are zeros.
void load_rows(Tile& t, const uint16_t* src, int64_t stride, int64_t rows, int64_t elements) {
  const __mmask32 part = static_cast<__mmask32>((1ull << clamp(elements, kTileDepth)) - 1);
  for (int r = 0; r < kVec; ++r) {
    t.row[r] = r < rows ? Vec{_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(part, src + r * stride))} : Vec::fill(0.f);
  }
}

// Loads the first `rows` of 32 rows, two per row of slots, and the first `elements` of their 16 elements. The rest are
// zeros.
void load_pairs(Tile& t, const uint16_t* src, int64_t stride, int64_t rows, int64_t elements) {
  const __mmask16 part = static_cast<__mmask16>((1u << clamp(elements, kVec)) - 1);
  const auto row = [&](int64_t r) {
    return r < rows ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(part, src + r * stride)) : _mm512_setzero_si512();
  };
  for (int r = 0; r < kVec; ++r) {
    const __m512i both = _mm512_or_si512(row(2 * r), _mm512_slli_epi32(row(2 * r + 1), 16));
    t.row[r] = {_mm512_castsi512_ps(both)};
  }
}

// sums (R * 16, 32) = R tiles of rows of a times two tiles of columns of b. The rows of a are `stride` bytes apart.
template <int R>
void multiply(const char* a, int64_t stride, int64_t step, int64_t next_rows, const char* b, int64_t steps,
              float* sums) {
  complete_stores();
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (R == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  constexpr int64_t kTileBytes = kTileFloats * sizeof(float), kRowBytes = kVec * sizeof(float);
  for (int64_t s = 0; s < steps; ++s, a += step, b += 2 * kTileBytes) {
    _tile_loadd(6, b, kRowBytes);
    _tile_loadd(7, b + kTileBytes, kRowBytes);
    _tile_loadd(4, a, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (R == 2) {
      _tile_loadd(5, a + next_rows, stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 2 * kRowBytes);
  _tile_stored(1, sums + kVec, 2 * kRowBytes);
  if constexpr (R == 2) {
    _tile_stored(2, sums + 2 * kTileFloats, 2 * kRowBytes);
    _tile_stored(3, sums + 2 * kTileFloats + kVec, 2 * kRowBytes);
  }
}

// Rounds sums (rows, cols), whose rows are 32 apart, and stores them in c.
void finish(const TilesArgs& args, const float* sums, int64_t r0, int64_t rows, int64_t n0, int64_t cols) {
  for (int64_t n = 0; n < cols; n += kVec) {
    const int count = static_cast<int>(clamp(cols - n, kVec));
    const Vec shift = args.bias ? Vec::load(as_bf16(args.bias) + n0 + n, count) : Vec::fill(0.f);
    for (int64_t r = 0; r < rows; ++r) {
      BF16* at = reinterpret_cast<BF16*>(args.c + (r0 + r) * args.c_row + n0 + n);
      const Vec sum = Vec::load(sums + r * 2 * kVec + n) + (args.add ? Vec::load(at, count) : shift);
      count == kVec ? sum.store(at) : sum.store(at, count);
    }
  }
}

}  // namespace

float* tiles_memory(int64_t floats) {
  return thread_scratch(floats);
}

void tiles_pack_a(const TilesArgs& args, int64_t begin, int64_t end) {
  const int64_t steps = args.steps();
  Tile t;
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t k0 = s * kTileDepth, left = args.k - k0, r0 = i * kVec;
      const uint16_t* src = args.a + r0 * args.a_row + k0 * args.a_col;
      if (args.a_col == 1) {
        load_rows(t, src, args.a_row, args.m - r0, left);
      } else {
        load_pairs(t, src, args.a_col, left, args.m - r0);
        transpose_square(t.row);
      }
      t.store(args.packed_a + (i * steps + s) * kTileFloats);
    }
  }
}

void tiles_pack_b(const TilesArgs& args, int64_t begin, int64_t end) {
  const int64_t steps = args.steps();
  Tile t;
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t k0 = s * kTileDepth, left = args.k - k0, n0 = i * kVec;
      const uint16_t* src = args.b + k0 * args.b_row + n0 * args.b_col;
      if (args.b_col == 1) {
        load_pairs(t, src, args.b_row, left, args.n - n0);
      } else {
        load_rows(t, src, args.b_col, args.n - n0, left);
        transpose_square(t.row);
      }
      t.store(args.packed_b + ((i / 2 * steps + s) * 2 + i % 2) * kTileFloats);
    }
  }
}

void tiles_multiply(const TilesArgs& args, int64_t begin, int64_t end) {
  const Tiles tiles;
  constexpr int64_t kBlock = kTilesBlock;
  const int64_t steps = args.steps(), panels = (args.n + kBlock - 1) / kBlock, tasks = args.rows / kBlock * panels;
  alignas(64) float sums[kBlock * kBlock];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task / tasks * args.rows;  // the first row of a part of the rows, which stays in the L2 cache
    const int64_t blocks = (clamp(args.m - part, args.rows) + kBlock - 1) / kBlock;
    const int64_t p = task % tasks / blocks, r0 = part + task % tasks % blocks * kBlock, n0 = p * kBlock;
    const int64_t rows = clamp(args.m - r0, kBlock);
    const char* b = reinterpret_cast<const char*>(args.packed_b + p * steps * 2 * kTileFloats);
    const char* a = args.packed_a ? reinterpret_cast<const char*>(args.packed_a + r0 / kVec * steps * kTileFloats)
                                  : reinterpret_cast<const char*>(args.a + r0 * args.a_row);
    const int64_t stride = args.packed_a ? 64 : 2 * args.a_row, step = args.packed_a ? 1024 : 64;
    const int64_t next_rows = args.packed_a ? 1024 * steps : 16 * stride;
    rows > kVec ? multiply<2>(a, stride, step, next_rows, b, steps, sums)
                : multiply<1>(a, stride, step, next_rows, b, steps, sums);
    finish(args, sums, r0, rows, n0, clamp(args.n - n0, kBlock));
  }
}

}  // namespace fastattn
