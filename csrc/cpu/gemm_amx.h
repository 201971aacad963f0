#pragma once
// How a product in bfloat16 with the tiles of AMX is divided between threads, for the wrappers that compute one.
#include "dispatch.h"
#include "gemm_tiles.h"
#include "host.h"

namespace fastattn {

#if defined(__x86_64__)
// Computes the product of args, whose operands, sizes, strides, bias and `add` are set.
inline void run_tiles(TilesArgs args) {
  constexpr int64_t kTileFloats = 256, kTile = 16;
  constexpr int64_t kMostPacked = 1 << 20;   // floats of each operand that are packed at a time
  constexpr int64_t kPartBytes = 1 << 20;    // bytes of the rows of a that stay in the L2 cache
  constexpr int64_t kLeastWork = 1 << 21;    // the multiplications that justify waking a thread
  constexpr int64_t kLeastPacked = 1 << 15;  // the packed elements that justify waking a thread
  const int64_t m = args.m, n = args.n, steps = args.steps();
  if (m * n == 0) {
    return;
  }
  const auto whole = [](int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; };
  // The number of rows or columns to pack at a time.
  const auto at_once = [&](int64_t count) {
    const int64_t most = kMostPacked / (std::max<int64_t>(1, steps) * kTile) / kTilesBlock * kTilesBlock;
    return std::min(whole(count, kTilesBlock), std::max(most, kTilesBlock));
  };
  const bool packs_a = args.a_col != 1 || args.k % 32 != 0 || m % kTile != 0;
  const int64_t rows = packs_a ? at_once(m) : m, cols = at_once(n);
  const int64_t floats = steps * kTile;  // the size of a packed row or column
  float* memory = tiles_memory((packs_a ? rows * floats : 0) + cols * floats);
  STD_TORCH_CHECK(memory, "gemm: out of memory");
  const auto pack = [&](int64_t count, void (*kernel)(const TilesArgs&, int64_t, int64_t)) {
    const int64_t work = kTileFloats * 2 * std::max<int64_t>(1, steps);
    torch::stable::parallel_for(0, count / kTile, std::max<int64_t>(1, kLeastPacked / work),
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  };
  const TilesArgs all = args;
  for (int64_t r0 = 0; r0 < m; r0 += rows) {
    for (int64_t n0 = 0; n0 < n; n0 += cols) {
      args.m = std::min(rows, m - r0);
      args.n = std::min(cols, n - n0);
      args.a = all.a + r0 * all.a_row;
      args.b = all.b + n0 * all.b_col;
      args.bias = all.bias ? all.bias + n0 : nullptr;
      args.c = all.c + r0 * all.c_row + n0;
      args.packed_b = memory;
      args.packed_a = packs_a ? memory + cols * floats : nullptr;
      if (packs_a && n0 == 0) {
        pack(whole(args.m, kTilesBlock), tiles_pack_a);
      }
      pack(whole(args.n, kTilesBlock), tiles_pack_b);
      const int64_t part = kPartBytes / (4 * std::max<int64_t>(1, floats)) / kTilesBlock * kTilesBlock;
      args.rows = std::max(kTilesBlock, std::min(part, whole(args.m, kTilesBlock)));
      const int64_t tasks = whole(args.m, kTilesBlock) / kTilesBlock * (whole(args.n, kTilesBlock) / kTilesBlock);
      const int64_t work = kTilesBlock * kTilesBlock * std::max<int64_t>(1, args.k);
      torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, kLeastWork / work),
                                  [&](int64_t begin, int64_t end) { tiles_multiply(args, begin, end); });
    }
  }
}
#endif

}  // namespace fastattn
