#pragma once
// Shared by the wrapper and the kernels of a product in bfloat16 with the tiles of AMX.
#include <cstdint>

namespace fastattn {

// c (m, n) = a (m, k) · b (k, n) in bfloat16, plus bias or plus c, with the tiles of AMX. The numbers are passed as
// their bits. As in GemmArgs, one stride of a must be 1, and so must one stride of b.
struct TilesArgs {
  const uint16_t *a, *b;
  const uint16_t* bias;  // (n), or null
  uint16_t* c;           // rows c_row apart
  int64_t m, n, k;
  int64_t a_row, a_col, b_row, b_col, c_row;
  bool add;  // adds the product to c
  // Memory for whole blocks. packed_a is null if the tiles of a can be loaded in place.
  float *packed_a, *packed_b;
  int64_t rows;  // the number of rows of a that stay in the L2 cache

  int64_t steps() const { return (k + 31) / 32; }  // the number of tiles along k
};
constexpr int64_t kTilesBlock = 32;                                      // the rows and the columns of a task
float* tiles_memory(int64_t floats);                                     // memory of this thread, or null
void tiles_pack_a(const TilesArgs& args, int64_t begin, int64_t end);    // processes strips of 16 rows
void tiles_pack_b(const TilesArgs& args, int64_t begin, int64_t end);    // processes strips of 16 columns
void tiles_multiply(const TilesArgs& args, int64_t begin, int64_t end);  // processes tasks

}  // namespace fastattn
