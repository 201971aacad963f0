#pragma once
// How a product of few rows is divided between threads, for the wrappers that make one.
#include "dispatch.h"
#include "gemv_call.h"
#include "host.h"

namespace fastattn {

inline void run_gemv(const GemvArgs& args) {
  constexpr int64_t kLeastWork = 1 << 17;  // multiplications that are worth waking a thread
  if (args.m * args.n == 0) {
    return;
  }
  const auto kernel = FASTATTN_SELECT_CPU(gemv);
  const int64_t tasks = (args.n + kGemvGroup - 1) / kGemvGroup;
  const int64_t work = std::max<int64_t>(1, kGemvGroup * args.m * args.k);
  torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, kLeastWork / work),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace fastattn
