#pragma once
// A product in bfloat16 with the tiles of AMX: what its wrapper and its kernels share.
#include <cstdint>

namespace fastattn {

// c (m, n) = a (m, k) · b (k, n) in bfloat16, whose bits these are, plus bias or plus c, by the tiles of AMX. As in
// GemmArgs one stride of a is 1, and one of b.
struct TilesArgs {
  const uint16_t *a, *b;
  const uint16_t* bias;  // (n), or null
  uint16_t* c;           // rows c_row apart
  int64_t m, n, k;
  int64_t a_row, a_col, b_row, b_col, c_row;
  bool add;                    // to c
  float *packed_a, *packed_b;  // memory for whole blocks; packed_a is null if tiles of a can be loaded in place
  int64_t rows;                // of a that stay in the second cache

  int64_t steps() const { return (k + 31) / 32; }  // of a tile's depth
};
constexpr int64_t kTilesBlock = 32;                                      // rows and columns of a task
float* tiles_memory(int64_t floats);                                     // of this thread, or null
void tiles_pack_a(const TilesArgs& args, int64_t begin, int64_t end);    // 16 rows each
void tiles_pack_b(const TilesArgs& args, int64_t begin, int64_t end);    // 16 columns each
void tiles_multiply(const TilesArgs& args, int64_t begin, int64_t end);  // tasks

}  // namespace fastattn
