// CPU ops on the LibTorch stable ABI. The library uses no libtorch C++ symbol and no Python symbol. So it works with
// every torch from TORCH_TARGET_VERSION on and with every Python. The schemas are in a library that this one links to
// (schemas.cpp). This file contains what does not belong to a single op.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>

#include "capability.h"

namespace {

// Returns the number of chunks that parallel_for makes of 64 pieces. This shows that the kernels run on torch's
// threads.
int64_t parallel_chunks() {
  std::atomic<int64_t> chunks{0};
  torch::stable::parallel_for(0, 64, 1, [&](int64_t, int64_t) { ++chunks; });
  return chunks;
}

int64_t cpu_capability() {
  return static_cast<int64_t>(fastattn::cpu_capability());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CompositeExplicitAutograd, m) {
  m.impl("parallel_chunks", TORCH_BOX(&parallel_chunks));
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}
