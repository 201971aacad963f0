// Checks whether this library can run on a device. Python calls this before it chooses a kernel.
#include <cuda_runtime.h>

#include <cstdio>

namespace {

// Compiled for the same architectures as the kernels that run on every GPU.
__global__ void probe() {}

cudaError_t first_error(int* driver, int* runtime) {
  int count = 0;
  cudaFuncAttributes attributes;
  cudaDriverGetVersion(driver);
  cudaRuntimeGetVersion(runtime);
  // This fails if the driver is older than the runtime of this library, which need not be the runtime of torch.
  if (const cudaError_t error = cudaGetDeviceCount(&count)) {
    return error;
  }
  // This fails if there is no code for the device.
  return cudaFuncGetAttributes(&attributes, probe);
}

}  // namespace

// Returns the reason why the current device cannot be used, or null. The text is valid until the thread calls this
// again.
extern "C" __attribute__((visibility("default"))) const char* fastattn_cuda_refusal() {
  static thread_local char text[256];
  int driver = 0, runtime = 0;
  const cudaError_t error = first_error(&driver, &runtime);
  cudaGetLastError();  // clears the error, so that later launches do not report it
  if (error == cudaSuccess) {
    return nullptr;
  }
  std::snprintf(text, sizeof(text), "%s (the runtime is CUDA %d.%d, the driver serves up to %d.%d)",
                cudaGetErrorString(error), runtime / 1000, runtime % 1000 / 10, driver / 1000, driver % 1000 / 10);
  return text;
}
