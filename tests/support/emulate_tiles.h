#pragma once
// The tiles of AMX in software, for processors with AVX512-BF16 that have none. Include this before every other file.
#include <immintrin.h>

#include <cstdio>
#include <cstdlib>
#define __AMX_BF16__ 1

namespace emulated {

struct Registers {
  __m512 row[8][16];
  bool configured = false;
};
inline thread_local Registers tiles;

inline void check() {
  if (!tiles.configured) {
    std::fputs("a tile is used before _tile_loadconfig or after _tile_release\n", stderr);
    std::abort();
  }
}

inline void configure(const void* shapes) {
  const auto* byte = static_cast<const unsigned char*>(shapes);
  for (int i = 0; i < 8; ++i) {  // the kernels use whole tiles only
    if (byte[0] != 1 || byte[16 + 2 * i] != 64 || byte[48 + i] != 16) {
      std::fputs("expected eight tiles of 16 rows of 64 bytes\n", stderr);
      std::abort();
    }
  }
  tiles.configured = true;
}

inline void zero(int t) {
  check();
  for (__m512& row : tiles.row[t]) {
    row = _mm512_setzero_ps();
  }
}

inline void load(int t, const void* from, long stride) {
  check();
  for (int r = 0; r < 16; ++r) {
    tiles.row[t][r] = _mm512_loadu_ps(static_cast<const char*>(from) + r * stride);
  }
}

inline void store(int t, void* to, long stride) {
  check();
  for (int r = 0; r < 16; ++r) {
    _mm512_storeu_ps(static_cast<char*>(to) + r * stride, tiles.row[t][r]);
  }
}

inline void multiply_add(int c, int a, int b) {
  check();
  for (int r = 0; r < 16; ++r) {
    alignas(64) float pairs[16];
    _mm512_store_ps(pairs, tiles.row[a][r]);
    for (int k = 0; k < 16; ++k) {
      const auto pair = reinterpret_cast<__m512bh>(_mm512_set1_ps(pairs[k]));
      tiles.row[c][r] = _mm512_dpbf16_ps(tiles.row[c][r], pair, reinterpret_cast<__m512bh>(tiles.row[b][k]));
    }
  }
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::configure
#define _tile_release() (emulated::tiles.configured = false)
#define _tile_zero emulated::zero
#define _tile_loadd(t, from, stride) emulated::load(t, from, static_cast<long>(stride))
#define _tile_stored(t, to, stride) emulated::store(t, to, static_cast<long>(stride))
#define _tile_dpbf16ps emulated::multiply_add
