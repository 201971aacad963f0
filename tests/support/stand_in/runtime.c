// A stand-in for the CUDA driver, its runtime, cuBLAS and NCCL: with it a CUDA build of torch runs on a machine without
// a GPU. Memory of the host counts as memory of the device and starts as zeros. Copies are made; kernels and products
// do nothing. What a device would refuse is refused: an empty or too large launch, and allocations and waits in a
// capture. without_gpu.sh builds it, adds a function that returns 0 for everything else that torch imports, and runs a
// command.
//   STAND_IN_ARCH     the capability of the devices, 90 by default
//   STAND_IN_GPUS     their number, 1 by default
//   STAND_IN_VERBOSE  if set, says which launches were refused and which functions of the driver are missing
#define _GNU_SOURCE
#include <dlfcn.h>
#include <driver_types.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "driver.c"

typedef cudaError_t E;
enum { kMemoryGiB = 16 };
static __thread int device;
static __thread E last_error;
static __thread int mode;             // of captures, of this thread
static unsigned long long capturing;  // the number of the capture that is under way, or 0
static unsigned long long captures;
static char handle[4096];  // what every handle points to
static int refusals;       // of allocations and waits in a capture

int stand_in_refusals(void) {
  return refusals;
}

static int gpus(void) {
  const char* text = getenv("STAND_IN_GPUS");
  return text ? atoi(text) : 1;
}
static E fail(E error) {
  return last_error = error;
}
// what a capture forbids
static E outside_capture(void) {
  if (capturing && mode != cudaStreamCaptureModeRelaxed) {
    ++refusals;
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}

// devices
E cudaGetDeviceCount(int* count) {
  return *count = gpus(), cudaSuccess;
}
E cudaGetDevice(int* index) {
  return *index = device, cudaSuccess;
}
E cudaSetDevice(int index) {
  if (index < 0 || index >= gpus()) {
    return fail(cudaErrorInvalidDevice);
  }
  return device = index, cudaSuccess;
}
E cudaDriverGetVersion(int* version) {
  return *version = 13000, cudaSuccess;
}
E cudaRuntimeGetVersion(int* version) {
  return *version = 13000, cudaSuccess;
}
E cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int index) {
  cuDeviceGetAttribute(value, (CUdevice_attribute)attribute, index);
  switch (attribute) {  // what torch and CUB ask for in addition to Triton's questions
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      return *value = 1024, cudaSuccess;
    case cudaDevAttrMaxBlockDimZ:
      return *value = 64, cudaSuccess;
    case cudaDevAttrMaxGridDimX:
      return *value = 0x7fffffff, cudaSuccess;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      return *value = 65535, cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return *value = 2048, cudaSuccess;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      return *value = 32, cudaSuccess;
    default:
      return cudaSuccess;
  }
}
E cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
E cudaDeviceCanAccessPeer(int* can, int a, int b) {
  return *can = 0, cudaSuccess;
}
E cudaMemGetInfo(size_t* available, size_t* total) {
  return *available = *total = (size_t)kMemoryGiB << 30, cudaSuccess;
}
E cudaGetDeviceProperties(struct cudaDeviceProp* p, int index) {
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof(p->name), "Stand-in for sm_%d", arch());
  p->major = arch() / 10, p->minor = arch() % 10;
  p->totalGlobalMem = (size_t)kMemoryGiB << 30;
  int optin;
  cuDeviceGetAttribute(&optin, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, index);
  p->sharedMemPerBlockOptin = optin, p->sharedMemPerMultiprocessor = optin + 1024, p->sharedMemPerBlock = 49152;
  p->multiProcessorCount = 132, p->warpSize = 32, p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048;
  p->regsPerMultiprocessor = p->regsPerBlock = 65536, p->l2CacheSize = 50 << 20;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  return cudaSuccess;
}
E cudaDeviceGetPCIBusId(char* text, int length, int index) {
  return snprintf(text, length, "0000:%02x:00.0", index), cudaSuccess;
}
E cudaGetLastError(void) {
  const E error = last_error;
  return last_error = cudaSuccess, error;
}
E cudaPeekAtLastError(void) {
  return last_error;
}
const char* cudaGetErrorString(E error) {
  static char text[64];
  return snprintf(text, sizeof(text), "error %d of the stand-in", error), text;
}
const char* cudaGetErrorName(E error) {
  return "standInError";
}

// memory
static E take(void** to, size_t bytes) {
  if (bytes > (size_t)kMemoryGiB << 30) {
    return fail(cudaErrorMemoryAllocation);
  }
  if (bytes >= 1 << 16) {  // an anonymous mapping is aligned, zero, and costs nothing until it is touched
    *to = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return *to == MAP_FAILED ? fail(cudaErrorMemoryAllocation) : cudaSuccess;
  }
  if (posix_memalign(to, 512, 1 << 16)) {
    return fail(cudaErrorMemoryAllocation);
  }
  return memset(*to, 0, 1 << 16), cudaSuccess;
}
E cudaMalloc(void** to, size_t bytes) {
  return outside_capture() ? last_error : take(to, bytes);
}
E cudaMallocHost(void** to, size_t bytes) {
  return take(to, bytes);
}
E cudaHostAlloc(void** to, size_t bytes, unsigned flags) {
  return take(to, bytes);
}
// Memory is not given back: nothing remembers how it was taken. Torch keeps what it has in a cache of its own.
E cudaMemcpyAsync(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return memcpy(to, from, bytes), cudaSuccess;
}
E cudaMemcpy(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind) {
  return outside_capture() ? last_error : (memcpy(to, from, bytes), cudaSuccess);
}
E cudaMemcpyPeerAsync(void* to, int a, const void* from, int b, size_t bytes, cudaStream_t stream) {
  return memcpy(to, from, bytes), cudaSuccess;
}
E cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                    enum cudaMemcpyKind kind, cudaStream_t stream) {
  for (size_t i = 0; i < height; ++i) {
    memcpy((char*)to + i * to_pitch, (const char*)from + i * from_pitch, width);
  }
  return cudaSuccess;
}
E cudaMemset(void* to, int value, size_t bytes) {
  return memset(to, value, bytes), cudaSuccess;
}
E cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return memset(to, value, bytes), cudaSuccess;
}
E cudaPointerGetAttributes(struct cudaPointerAttributes* found, const void* pointer) {
  memset(found, 0, sizeof *found);
  found->type = cudaMemoryTypeUnregistered;
  found->device = device;
  return cudaSuccess;
}

// streams, events, captures
E cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  return *stream = calloc(1, 64), cudaSuccess;
}
E cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return *stream = calloc(1, 64), cudaSuccess;
}
E cudaStreamCreate(cudaStream_t* stream) {
  return *stream = calloc(1, 64), cudaSuccess;
}
E cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  return *priority = 0, cudaSuccess;
}
E cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  return *event = (cudaEvent_t)handle, cudaSuccess;
}
E cudaEventCreate(cudaEvent_t* event) {
  return *event = (cudaEvent_t)handle, cudaSuccess;
}
E cudaEventElapsedTime(float* milliseconds, cudaEvent_t a, cudaEvent_t b) {
  return *milliseconds = 1, cudaSuccess;
}
E cudaDeviceSynchronize(void) {
  return outside_capture();
}
E cudaStreamSynchronize(cudaStream_t stream) {
  return outside_capture();
}
E cudaEventSynchronize(cudaEvent_t event) {
  return outside_capture();
}
E cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* wanted) {
  const int before = mode;
  return mode = *wanted, *wanted = before, cudaSuccess;
}
E cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode wanted) {
  return capturing = ++captures, cudaSuccess;
}
E cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  return capturing = 0, *graph = (cudaGraph_t)handle, cudaSuccess;
}
E cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus* status) {
  return *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone, cudaSuccess;
}
E cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus* status, unsigned long long* id,
                           cudaGraph_t* graph, const cudaGraphNode_t** nodes, const void** edges, size_t* count) {
  cudaStreamIsCapturing(stream, status);
  if (id) *id = capturing;
  if (graph) *graph = (cudaGraph_t)handle;
  if (nodes) *nodes = 0;
  if (edges) *edges = 0;
  if (count) *count = 0;
  return cudaSuccess;
}
E cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long flags) {
  return *made = (cudaGraphExec_t)handle, cudaSuccess;
}
E cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  return *count = 1, cudaSuccess;
}

// launches: what a driver would refuse is refused
static E launch(dim3 grid, dim3 block, size_t shared) {
  const size_t threads = (size_t)block.x * block.y * block.z;
  const int empty = !grid.x || !grid.y || !grid.z || !threads;
  if (empty || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || threads > 1024 || shared > 232448) {
    if (getenv("STAND_IN_VERBOSE")) {
      fprintf(stderr, "stand-in: grid %u %u %u, block %u %u %u, shared %zu refused\n", grid.x, grid.y, grid.z, block.x,
              block.y, block.z, shared);
    }
    return fail(cudaErrorInvalidConfiguration);
  }
  ++launches;
  return cudaSuccess;
}
E cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void** parameters, size_t shared, cudaStream_t stream) {
  return launch(grid, block, shared);
}
E __cudaLaunchKernel(void* f, dim3 grid, dim3 block, void** parameters, size_t shared, cudaStream_t stream) {
  return launch(grid, block, shared);
}
E cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* f, void** parameters) {
  return launch(config->gridDim, config->blockDim, config->dynamicSmemBytes);
}
E cudaFuncGetAttributes(struct cudaFuncAttributes* found, const void* f) {
  if (arch() < 80) {
    return fail(cudaErrorNoKernelImageForDevice);  // as for a library with code for newer devices only
  }
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024, found->numRegs = 64, found->binaryVersion = found->ptxVersion = arch();
  found->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
E cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void* f, int block, size_t shared) {
  return *count = 2, cudaSuccess;
}
E cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void* f, int block, size_t shared,
                                                         unsigned flags) {
  return *count = 2, cudaSuccess;
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void** parameters, void** extra) {
  const CUlaunchConfig config = {.gridDimX = gx,
                                 .gridDimY = gy,
                                 .gridDimZ = gz,
                                 .blockDimX = bx,
                                 .blockDimY = by,
                                 .blockDimZ = bz,
                                 .sharedMemBytes = shared};
  return cuLaunchKernelEx(&config, f, parameters, extra);
}

// what the driver is asked for by name
CUresult cuGetProcAddress_v2(const char* name, void** found, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult* status) {
  *found = dlsym(RTLD_DEFAULT, name);
  if (status) {
    *status = *found ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  }
  if (!*found && getenv("STAND_IN_VERBOSE")) {
    fprintf(stderr, "stand-in: %s is missing\n", name);
  }
  return *found ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
E cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned version, unsigned long long flags,
                                   enum cudaDriverEntryPointQueryResult* status) {
  CUdriverProcAddressQueryResult result;
  cuGetProcAddress_v2(name, found, version, flags, &result);
  if (status) {
    *status = *found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  }
  return cudaSuccess;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice index, unsigned* flags, int* active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}
CUresult cuModuleLoad(CUmodule* module, const char* path) {
  return *module = (CUmodule)1, CUDA_SUCCESS;
}
CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned n, CUjit_option* options, void** values) {
  return *module = (CUmodule)1, CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* count, CUfunction f, int block, size_t shared) {
  return *count = 2, CUDA_SUCCESS;
}

// cuBLAS, cuDNN and NCCL: handles exist, products and exchanges do nothing
int cublasCreate_v2(void** made) {
  return *made = handle, 0;
}
int cublasLtCreate(void** made) {
  return *made = handle, 0;
}
int cublasGetMathMode(void* of, int* found) {
  return *found = 0;
}
int cublasGetPointerMode_v2(void* of, int* found) {
  return *found = 0;
}
int cublasLtMatmulDescCreate(void** made, int compute, int scale) {
  return *made = handle, 0;
}
int cublasLtMatmulPreferenceCreate(void** made) {
  return *made = handle, 0;
}
int cublasLtMatrixLayoutCreate(void** made, int type, uint64_t rows, uint64_t columns, int64_t stride) {
  return *made = handle, 0;
}
int cublasLtMatmulAlgoGetHeuristic(void* of, void* d, void* a, void* b, void* c, void* e, void* p, int n, void* result,
                                   int* found) {
  return memset(result, 0, 96), *found = 1, 0;
}
int ncclGetVersion(int* version) {
  return *version = 22700, 0;
}
int ncclCommInitRankConfig(void** made, int ranks, char id[128], int rank, void* config) {
  return *made = handle, 0;
}
int ncclCommGetAsyncError(void* of, int* error) {
  return *error = 0;
}
int ncclCommCount(void* of, int* count) {
  return *count = gpus(), 0;
}
static const int kBytesOf[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};  // by ncclDataType_t
// exchanges act as if every process held the same values
static int same(const void* from, void* to, size_t count, int type) {
  if (to != from) {
    memcpy(to, from, count * kBytesOf[type]);
  }
  return 0;
}
int ncclAllReduce(const void* from, void* to, size_t count, int type, int op, void* of, cudaStream_t stream) {
  return same(from, to, count, type);
}
int ncclBroadcast(const void* from, void* to, size_t count, int type, int root, void* of, cudaStream_t stream) {
  return same(from, to, count, type);
}
int ncclReduceScatter(const void* from, void* to, size_t count, int type, int op, void* of, cudaStream_t stream) {
  return same(from, to, count, type);
}
int ncclAllGather(const void* from, void* to, size_t count, int type, void* of, cudaStream_t stream) {
  for (int i = 0; i < gpus(); ++i) {
    same(from, (char*)to + i * count * kBytesOf[type], count, type);
  }
  return 0;
}
const char* ncclGetErrorString(int error) {
  return "none";
}
const char* ncclGetLastError(void* of) {
  return "none";
}
