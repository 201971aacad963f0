#pragma once
// How a product with few rows is divided between threads, for the wrappers that compute one.
#include "dispatch.h"
#include "gemv_call.h"
#include "host.h"

namespace fastattn {

// Calls kernel(args, begin, end) for all groups of columns.
template <typename Args>
void for_groups(const Args& args, void (*kernel)(const Args&, int64_t, int64_t)) {
  constexpr int64_t kLeastWork = 1 << 17;  // the multiplications that justify waking a thread
  if (args.m * args.n == 0) {
    return;
  }
  const int64_t tasks = (args.n + kGemvGroup - 1) / kGemvGroup;
  const int64_t work = std::max<int64_t>(1, kGemvGroup * args.m * args.k);
  torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, kLeastWork / work),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

inline void run_gemv(const GemvArgs& args) {
  for_groups(args, FASTATTN_SELECT_CPU(gemv));
}

// The product in bfloat16.
inline void run_few_rows(FewRowsArgs args) {
#if defined(__x86_64__)
  if (has_dots()) {
    std::atomic<bool> failed{false};
    args.failed = &failed;
    for_groups(args, few_rows_avx512bf16);
    STD_TORCH_CHECK(!failed, "gemv: out of memory");
    return;
  }
#endif
  STD_TORCH_CHECK(false, "gemv: x in bfloat16 needs a processor with AVX512-BF16");
}

}  // namespace fastattn
