// A stand-in for libcuda.so.1 on machines without a GPU: it answers as one device of capability STAND_IN_ARCH, runs
// nothing, and records launches. Memory of the host counts as memory of the device. tests/support/launches.py reads the
// records; it tells in advance how many parameters the next launch has, because a driver reads that from the binary.
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kMostParameters = 256, kMostCalls = 64 };

typedef struct {
  char name[256];
  unsigned most_shared;  // bytes of a launch
} Function;

static struct {
  char name[256];
  unsigned grid[3], block, shared;
  uint64_t parameters[kMostParameters];  // the first 8 bytes of each
} last;
static unsigned expected;
static int launches;
static const char* calls[kMostCalls];  // the names of functions that were called, each once
static int called;

static int arch(void) {
  const char* text = getenv("STAND_IN_ARCH");
  return text ? atoi(text) : 90;
}

static CUresult note(const char* name) {
  for (int i = 0; i < called; ++i) {
    if (strcmp(calls[i], name) == 0) {
      return CUDA_SUCCESS;
    }
  }
  if (called < kMostCalls) {
    calls[called++] = name;
  }
  return CUDA_SUCCESS;
}
#define NOTE note(__func__)

// what launches.py calls
void stand_in_expect(unsigned parameters) {
  expected = parameters;
}
int stand_in_launches(void) {
  return launches;
}
const void* stand_in_last(void) {
  return &last;
}
// Writes the names of the functions called since the last time, separated by spaces.
void stand_in_calls(char* to, int room) {
  *to = 0;
  for (int i = 0; i < called; ++i) {
    const int used = (int)strlen(to);
    snprintf(to + used, room - used, "%s ", calls[i]);
  }
  called = 0;
}

CUresult cuInit(unsigned flags) {
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int* version) {
  return *version = 13000, CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* count) {
  return *count = 1, CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int index) {
  return *device = index, NOTE;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return *context = (CUcontext)1, NOTE;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  return *context = (CUcontext)1, NOTE;
}
CUresult cuCtxSetCurrent(CUcontext context) {
  return NOTE;
}
CUresult cuCtxGetDevice(CUdevice* device) {
  return *device = 0, NOTE;
}
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  return *value = 0, NOTE;
}
CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
  return NOTE;
}
CUresult cuCtxSynchronize(void) {
  return NOTE;
}
CUresult cuStreamSynchronize(CUstream stream) {
  return NOTE;
}
CUresult cuMemAlloc(CUdeviceptr* pointer, size_t bytes) {
  return *pointer = 0, NOTE;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, NOTE;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
  return *text = "an error of the stand-in", CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  const int small = arch() / 10 != 9 && arch() != 100 && arch() != 103;
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = arch() / 10;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *value = arch() % 10;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK:
      *value = 48 * 1024;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = arch() == 80 ? 166912 : small ? 101376 : 232448;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      *value = 65536;
      break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = 132;
      break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      *value = 32;
      break;
    default:
      *value = 0;
  }
  return NOTE;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  return *module = (CUmodule)1, NOTE;
}
CUresult cuModuleUnload(CUmodule module) {
  return NOTE;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  Function* made = calloc(1, sizeof(Function));  // kept until the process ends
  snprintf(made->name, sizeof(made->name), "%s", name);
  made->most_shared = 48 * 1024;  // without cuFuncSetAttribute
  return *function = (CUfunction)made, NOTE;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, NOTE;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  NOTE;
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    return CUDA_ERROR_INVALID_VALUE;  // as a driver that does not know newer attributes
  }
  ((Function*)function)->most_shared = value;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  return NOTE;
}
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction function, const CUlaunchConfig* config) {
  return *count = 66, NOTE;
}
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr*)data = pointer, NOTE;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                                const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                                const cuuint32_t* step, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  memset(map, 0, sizeof(*map));
  *(void**)map = data;  // launches.py looks for it
  return NOTE;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
  NOTE;
  const Function* made = (const Function*)function;
  const size_t threads = (size_t)config->blockDimX * config->blockDimY * config->blockDimZ;
  const int empty = config->gridDimX == 0 || config->gridDimY == 0 || config->gridDimZ == 0;
  const int large = config->gridDimX > 0x7fffffffu || config->gridDimY > 65535 || config->gridDimZ > 65535;
  if (empty || large || threads == 0 || threads > 1024 || config->sharedMemBytes > made->most_shared ||
      expected > kMostParameters) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  snprintf(last.name, sizeof(last.name), "%s", made->name);
  last.grid[0] = config->gridDimX;
  last.grid[1] = config->gridDimY;
  last.grid[2] = config->gridDimZ;
  last.block = (unsigned)threads;
  last.shared = config->sharedMemBytes;
  for (unsigned i = 0; i < expected; ++i) {
    memcpy(&last.parameters[i], parameters[i], sizeof(uint64_t));
  }
  ++launches;
  return CUDA_SUCCESS;
}
