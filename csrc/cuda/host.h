#pragma once
// Shared by the wrapper files of the CUDA ops. This is host code that the C++ compiler compiles without a CUDA header.
// So it compiles and links on a machine without a GPU and with a CPU-only torch.
#define USE_CUDA 1  // declares aoti_torch_get_current_cuda_stream, which is in libtorch_cuda.so
#include <torch/csrc/stable/accelerator.h>

#include "check.h"

namespace fastattn {

using torch::stable::accelerator::DeviceGuard;

// The current cudaStream_t of the tensor's device. accelerator::getCurrentStream().id() is not a cudaStream_t.
inline void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

inline void check_launch(int error, const char* op) {
  STD_TORCH_CHECK(error == 0, op, ": ", cuda_error_string(error));
}

// A parameter as the kernels read it: contiguous and in its own dtype, or null.
class Parameter {
 public:
  Parameter(const std::optional<Tensor>& tensor, const Tensor& like, int64_t cols, const char* name) {
    if (!tensor) {
      return;
    }
    STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == cols, name, " must have shape (", cols, "), got ",
                    tensor->numel(), " elements in ", tensor->dim(), " dimensions");
    check_device(tensor, like, name);
    dtype = dtype_of(*tensor, name);
    held_ = tensor->is_contiguous() ? tensor : contiguous_copy(*tensor);
    data = data_of(*held_);
  }

  const void* data = nullptr;
  DType dtype = DType::kFloat32;

 private:
  std::optional<Tensor> held_;
};

inline void check_width(int64_t cols) {
  constexpr int64_t kWidest = int64_t{1} << 30;
  STD_TORCH_CHECK(cols <= kWidest, "the last dimension must have at most ", kWidest, " elements, got ", cols);
}

}  // namespace fastattn
