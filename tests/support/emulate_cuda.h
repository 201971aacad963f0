#pragma once
// CUDA on one CPU thread, for tests. Every thread of a block is a fiber that runs until it must wait for others.
// Divergence that a GPU does not allow, such as a barrier or shuffle that some threads do not reach, is an error here.
// Memory order, timing and concurrent blocks are not emulated. emulated/cuda/sm90 adds the features of Hopper.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

namespace emulated {

constexpr size_t kStack = 256 * 1024;
constexpr size_t kMostShared = 227 * 1024;
enum class State { kRuns, kWaitsForWarp, kWaitsForBlock, kWaitsForEvent, kDone };

struct Fiber {
  ucontext_t start;  // enters the fiber once; then _longjmp switches, which makes no system call
  jmp_buf at;
  bool entered = false;
  std::vector<char> stack;
  State state;
  uint3 index;
  float exchanged;
  std::function<bool()> event;  // the event that a waiting thread waits for
};

static std::vector<Fiber> fibers;
static size_t fiber_count, current;
static ucontext_t start_of_scheduler;
static jmp_buf scheduler;
static std::function<void()> body;
static int launches;
alignas(1024) static unsigned char dynamic_shared[kMostShared];

// Units that work besides the threads. Called in every round; returns whether it did something. `urgent` means that no
// thread can run before it does.
static std::function<bool(bool urgent)> engine = [](bool) { return false; };
static std::vector<void (*)()> end_of_block;  // each fails if its part has work left

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s, block %u %u, thread %u %u\n", what, blockIdx.x, blockIdx.y,
               fibers[current].index.x, fibers[current].index.y);
  std::abort();
}

inline void wait(State state) {
  Fiber& fiber = fibers[current];
  fiber.state = state;
  if (_setjmp(fiber.at) == 0) {
    _longjmp(scheduler, 1);
  }
}

// Returns once `event` is true.
inline void wait_until(std::function<bool()> event) {
  if (!event()) {
    fibers[current].event = std::move(event);
    wait(State::kWaitsForEvent);
  }
}

inline void enter() {
  while (true) {  // the fiber serves this thread in every block
    body();
    wait(State::kDone);
  }
}

inline void resume(Fiber& fiber) {
  if (_setjmp(scheduler) == 0) {
    if (fiber.entered) {
      _longjmp(fiber.at, 1);
    }
    fiber.entered = true;
    swapcontext(&start_of_scheduler, &fiber.start);
  }
}

// If all threads in [begin, end) wait in `state`, releases them together and returns true.
inline bool release(size_t begin, size_t end, State state) {
  for (size_t i = begin; i < end; ++i) {
    if (fibers[i].state != state) {
      return false;
    }
  }
  for (size_t i = begin; i < end; ++i) {
    fibers[i].state = State::kRuns;
  }
  return true;
}

inline void run_block(size_t shared_bytes) {
  fiber_count = size_t{blockDim.x} * blockDim.y * blockDim.z;
  fibers.resize(1024);                              // the largest block; never moved while fibers use it
  std::memset(dynamic_shared, 0xff, shared_bytes);  // NaN in every type
  for (size_t i = 0; i < fiber_count; ++i) {
    Fiber& fiber = fibers[i];
    fiber.state = State::kRuns;
    fiber.index = {static_cast<unsigned>(i) % blockDim.x, static_cast<unsigned>(i) / blockDim.x, 0};
    if (!fiber.entered) {
      fiber.stack.resize(kStack);
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.data();
      fiber.start.uc_stack.ss_size = kStack;
      makecontext(&fiber.start, enter, 0);
    }
  }
  while (true) {
    size_t ran = 0;
    size_t done = 0;
    for (current = 0; current < fiber_count; ++current) {
      Fiber& fiber = fibers[current];
      if (fiber.state == State::kWaitsForEvent && fiber.event()) {
        fiber.state = State::kRuns;
      }
      if (fiber.state == State::kRuns) {
        threadIdx = fibers[current].index;
        resume(fibers[current]);
        ++ran;
      }
      done += fibers[current].state == State::kDone;
    }
    if (done == fiber_count) {
      for (const auto check : end_of_block) {
        check();
      }
      return;
    }
    bool released = release(0, fiber_count, State::kWaitsForBlock);
    for (size_t begin = 0; begin < fiber_count; begin += 32) {
      released = release(begin, std::min(begin + 32, fiber_count), State::kWaitsForWarp) || released;
    }
    if (!engine(ran == 0 && !released) && ran == 0 && !released) {
      current = 0;
      while (fibers[current].state == State::kDone) {
        ++current;
      }
      fail("a barrier or a shuffle is not reached by all threads, or nothing is left that could end a wait");
    }
  }
}

template <typename Kernel>
struct Launch {
  Kernel kernel;
  dim3 grid, block;
  size_t shared;

  template <typename... Args>
  void operator()(Args... args) const {
    gridDim = grid;
    blockDim = block;
    body = [&] { kernel(args...); };
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
      for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
          run_block(shared);
        }
      }
    }
  }
};

// The source is rewritten: kernel<<<grid, block, shared, stream>>>(args) becomes launch(kernel, grid, block, shared,
// stream)(args).
template <typename Kernel>
Launch<Kernel> launch(Kernel kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t) {
  if (grid.x == 0 || grid.y == 0 || block.x * block.y * block.z > 1024 || block.x * block.y * block.z == 0 ||
      shared > kMostShared) {
    std::fprintf(stderr, "emulated CUDA: invalid launch, grid %u %u, block %u %u\n", grid.x, grid.y, block.x, block.y);
    std::abort();
  }
  ++launches;
  return {kernel, grid, block, shared};
}

}  // namespace emulated

inline void __syncthreads() {
  emulated::wait(emulated::State::kWaitsForBlock);
}

inline void __syncwarp() {
  emulated::wait(emulated::State::kWaitsForWarp);
}

inline float __shfl_xor_sync(unsigned mask, float value, int offset) {
  using namespace emulated;
  if (mask != 0xffffffffu || fiber_count % 32 != 0) {
    fail("a shuffle of less than whole warps");
  }
  fibers[current].exchanged = value;
  wait(State::kWaitsForWarp);
  const float other = fibers[current ^ offset].exchanged;
  wait(State::kWaitsForWarp);
  return other;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  static_assert(sizeof(T) == sizeof(float));
  using namespace emulated;
  if (mask != 0xffffffffu || fiber_count % 32 != 0) {
    fail("a shuffle of less than whole warps");
  }
  std::memcpy(&fibers[current].exchanged, &value, sizeof(value));
  wait(State::kWaitsForWarp);
  std::memcpy(&value, &fibers[current / 32 * 32 + lane].exchanged, sizeof(value));
  wait(State::kWaitsForWarp);
  return value;
}

inline int __any_sync(unsigned mask, int predicate) {
  using namespace emulated;
  if (mask != 0xffffffffu || fiber_count % 32 != 0) {
    fail("a vote of less than whole warps");
  }
  fibers[current].exchanged = predicate != 0;
  wait(State::kWaitsForWarp);
  bool any = false;
  for (size_t lane = 0; lane < 32; ++lane) {
    any = any || fibers[current / 32 * 32 + lane].exchanged != 0;
  }
  wait(State::kWaitsForWarp);
  return any;
}

[[noreturn]] inline void __trap() {
  emulated::fail("a trap");
}

inline unsigned atomicAdd(unsigned* to, unsigned value) {
  const unsigned before = *to;
  *to += value;
  return before;
}

inline float rsqrtf(float value) {
  return 1.f / std::sqrt(value);
}
inline float __fdividef(float a, float b) {
  return b < 0x1p126f ? a / b : 0.f;
}
template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  return std::min<std::common_type_t<A, B>>(a, b);
}

extern "C" {
// returns the number of launches since the last call
__attribute__((visibility("default"))) int emulated_launches() {
  return std::exchange(emulated::launches, 0);
}
inline cudaError_t emulated_get_device(int* device) {
  return *device = 0, cudaSuccess;
}
inline cudaError_t emulated_get_attribute(int* value, cudaDeviceAttr, int) {
  return *value = 2, cudaSuccess;
}
}
#define cudaGetDevice emulated_get_device
#define cudaDeviceGetAttribute emulated_get_attribute  // a device with two multiprocessors
#define cudaGetLastError() cudaSuccess
#define cudaGetErrorString(error) "emulated"
#define cudaFuncSetAttribute(kernel, attribute, value) cudaSuccess
#define cudaMemsetAsync(to, value, bytes, stream) (std::memset(to, value, bytes), cudaSuccess)
