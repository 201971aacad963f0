#pragma once
// Shared by the wrapper files of the CPU ops: outputs, and the division of work among torch's threads.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "check.h"

namespace fastattn {

inline Tensor empty_cpu(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  return empty_on(aoti_torch_device_type_cpu(), 0, sizes, dtype);
}

constexpr int64_t kElementsPerTask = 16384;  // With fewer elements, waking a thread costs more than it saves.

// Calls work(begin, end) for parts of `count` pieces of `elements` elements each.
template <typename Work>
inline void for_pieces(int64_t count, int64_t elements, const Work& work) {
  if (count * elements == 0) {
    return;
  }
  if (count * elements <= kElementsPerTask) {
    work(0, count);
  } else {
    torch::stable::parallel_for(0, count, std::max<int64_t>(1, kElementsPerTask / elements), work);
  }
}

}  // namespace fastattn
