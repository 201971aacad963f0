// The text of the errors that the launchers return.
#include <cuda_runtime.h>

#include "api.h"

namespace fastattn {

const char* cuda_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace fastattn
