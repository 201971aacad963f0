// Whether this library can run on a device at all: what Python asks before it chooses a kernel.
#include <cuda_runtime.h>

#include <cstdio>

namespace {

// Compiled for the same architectures as the kernels that every GPU may run.
__global__ void probe() {}

cudaError_t first_error(int* driver, int* runtime) {
  int count = 0;
  cudaFuncAttributes attributes;
  cudaDriverGetVersion(driver);
  cudaRuntimeGetVersion(runtime);
  // fails where the driver is older than this library's runtime, whatever torch's is
  if (const cudaError_t error = cudaGetDeviceCount(&count)) {
    return error;
  }
  return cudaFuncGetAttributes(&attributes, probe);  // fails where there is no code for the device
}

}  // namespace

// The reason for the current device, or null. The text lives until the thread asks again.
extern "C" __attribute__((visibility("default"))) const char* fastattn_cuda_refusal() {
  static thread_local char text[256];
  int driver = 0, runtime = 0;
  const cudaError_t error = first_error(&driver, &runtime);
  cudaGetLastError();  // later launches shall not see it
  if (error == cudaSuccess) {
    return nullptr;
  }
  std::snprintf(text, sizeof(text), "%s (the runtime is CUDA %d.%d, the driver serves up to %d.%d)",
                cudaGetErrorString(error), runtime / 1000, runtime % 1000 / 10, driver / 1000, driver % 1000 / 10);
  return text;
}
