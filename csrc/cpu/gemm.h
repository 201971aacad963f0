#pragma once
// How a product is divided between threads, for the wrappers that compute one.
#include <atomic>

#include "dispatch.h"
#include "host.h"

namespace fastattn {

// Computes the product of args, whose sizes, strides, bias and `add` are set.
inline void run_gemm(GemmArgs args) {
  constexpr int64_t kMostFewRows = 64;     // With more rows, packing b pays off.
  constexpr int64_t kRowsOfPackedA = 384;  // once packed, they stay in the L2 cache together with a panel of b
  constexpr int64_t kRegisterRows = 6;
  constexpr int64_t kLeastWork = 1 << 18;  // the multiplications that justify waking a thread
  const int64_t m = args.m, n = args.n, k = args.k;
  if (m * n == 0) {
    return;
  }
  std::atomic<bool> failed{false};
  args.failed = &failed;
  const auto kernel = FASTATTN_SELECT_CPU(gemm);
  int64_t tasks, work;
  if (m <= kMostFewRows && args.b_row == 1 && !args.add) {
    args.way = GemmArgs::Way::kFewRows;
    tasks = (n + kGemmGroup - 1) / kGemmGroup;
    work = kGemmGroup * m * k;
  } else {
    args.way = GemmArgs::Way::kBlocked;
    const int64_t panels = (n + kGemmPanel - 1) / kGemmPanel;
    const int64_t threads = torch::stable::get_num_threads();
    int64_t blocks = args.a_col == 1 ? 1 : (m + kRowsOfPackedA - 1) / kRowsOfPackedA;
    blocks = std::max(blocks, (2 * threads + panels - 1) / panels);
    args.rows = ((m + blocks - 1) / blocks + kRegisterRows - 1) / kRegisterRows * kRegisterRows;
    blocks = (m + args.rows - 1) / args.rows;
    tasks = panels * blocks;
    work = args.rows * kGemmPanel * k;
  }
  torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, kLeastWork / std::max<int64_t>(1, work)),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  STD_TORCH_CHECK(!failed, "gemm: out of memory");
}

}  // namespace fastattn
