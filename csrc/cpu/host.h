#pragma once
// What the wrapper files of the CPU ops share: outputs, and the division of work between torch's threads.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "check.h"

namespace fastattn {

// An uninitialised contiguous CPU tensor: a third of the cost of torch::stable::empty, which goes through the
// dispatcher.
inline Tensor empty_cpu(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  constexpr size_t kMaxDims = 64;
  const size_t dims = sizes.size();
  STD_TORCH_CHECK(dims <= kMaxDims, "at most ", kMaxDims, " dimensions, got ", dims);
  int64_t strides[kMaxDims];
  int64_t stride = 1;
  for (size_t d = dims; d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, sizes[d]);
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(dims), sizes.data(), strides,
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// as_rows of an operand with the shape of `like`; without a tensor the data is not to be used.
inline Rows as_rows_like(const std::optional<Tensor>& tensor, const Tensor& like, const char* name) {
  if (!tensor) {
    return {like, 0, 0, 0};
  }
  const auto sizes = tensor->sizes();
  const auto wanted = like.sizes();
  STD_TORCH_CHECK(sizes.size() == wanted.size() && std::equal(sizes.begin(), sizes.end(), wanted.begin()), name,
                  " must have ", like.numel(), " elements in the shape of the first operand, got ", tensor->numel());
  return as_rows(*tensor);
}

constexpr int64_t kElementsPerTask = 16384;  // below it, waking a thread costs more than it saves

// work(begin, end) over `count` pieces of `elements` elements each.
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
