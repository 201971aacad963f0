#pragma once
// Replaces csrc/cuda/sm90/tma.cuh. A copy happens some time after it is issued, and copies happen in any order; until
// then the target holds NaN. The encoder checks the requirements that the driver's documentation states for a tensor
// map.
#include <cuda.h>

#include "cuda/sm90/mbarrier.cuh"

namespace emulated {

struct Map {
  char* data;
  uint64_t size[4], stride[3];  // in elements and bytes
  uint64_t rows, cols;          // of a box
  uint64_t bfloat16;            // or float16; a full word, so that there is no padding and tests can compare maps
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

inline CUresult encode(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* size,
                       const cuuint64_t* stride, const cuuint32_t* box, const cuuint32_t* step,
                       CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                       CUtensorMapFloatOOBfill fill) {
  bool valid = rank == 4 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  valid = valid && (type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16);
  for (int d = 0; d < 4; ++d) {
    valid = valid && size[d] > 0 && size[d] <= uint64_t{1} << 32 && box[d] > 0 && box[d] <= 256 && step[d] == 1;
    valid = valid && (d == 3 || (stride[d] > 0 && stride[d] % 16 == 0 && stride[d] < uint64_t{1} << 40));
  }
  valid = valid && box[0] == (swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 64 : 32) && box[2] == 1 && box[3] == 1;
  valid = valid && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE;
  valid = valid && (swizzle == CU_TENSOR_MAP_SWIZZLE_128B || swizzle == CU_TENSOR_MAP_SWIZZLE_64B);
  if (!valid || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  Map map{static_cast<char*>(data),
          {size[0], size[1], size[2], size[3]},
          {stride[0], stride[1], stride[2]},
          box[1],
          box[0],
          type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16};
  std::memcpy(out, &map, sizeof(map));
  return CUDA_SUCCESS;
}

struct Copy {
  Map map;
  int col, row, head, batch;
  uint32_t shared;
  fastattn::sm90::Barrier* barrier;  // of a load
  const char* from;                  // a plain load: `bytes` bytes from here
  int bytes;
  bool adds = false;    // a store
  float* to = nullptr;  // a plain store
  size_t thread = current;
  std::vector<unsigned char> source = {};  // of a store, when it was issued

  void load() const {
    if (from != nullptr) {
      std::memcpy(dynamic_shared + shared, from, bytes);
    } else {
      each([](uint16_t* inside, uint16_t* here) { *here = inside != nullptr ? *inside : 0; });
    }
    barrier->complete(bytes);
  }
  void issue_store();
  void store() const {
    if (std::memcmp(source.data(), dynamic_shared + shared, bytes) != 0) {
      fail("shared memory changed while a copy read it");
    }
    if (to != nullptr) {
      for (int i = 0; i < bytes / 4; ++i) {
        to[i] += *shared_pointer<float>(shared + 4 * i);
      }
      return;
    }
    each([this](uint16_t* inside, uint16_t* here) {
      if (inside != nullptr && adds) {
        map.bfloat16 ? add<__nv_bfloat16>(inside, here) : add<__half>(inside, here);
      } else if (inside != nullptr) {
        *inside = *here;
      }
    });
  }

 private:
  template <typename T>
  static void add(uint16_t* to, const uint16_t* value) {
    T a, b;
    std::memcpy(&a, to, sizeof(a));
    std::memcpy(&b, value, sizeof(b));
    const T sum(static_cast<float>(a) + static_cast<float>(b));
    std::memcpy(to, &sum, sizeof(sum));
  }
  template <typename Body>
  void each(Body body) const {
    for (uint32_t r = 0; r < map.rows; ++r) {
      for (uint32_t c = 0; c < map.cols; ++c) {
        const int64_t at[] = {col + c, int64_t{row} + r, head, batch};
        bool inside = true;
        for (int d = 0; d < 4; ++d) {
          inside = inside && at[d] >= 0 && at[d] < static_cast<int64_t>(map.size[d]);
        }
        char* element = map.data + at[0] * 2;
        for (int d = 1; d < 4; ++d) {
          element += at[d] * static_cast<int64_t>(map.stride[d - 1]);
        }
        body(inside ? reinterpret_cast<uint16_t*>(element) : nullptr,
             shared_pointer<uint16_t>(swizzled(shared + (r * map.cols + c) * 2, map.cols * 2)));
      }
    }
  }
};

static std::vector<Copy> loads, stores;

inline void Copy::issue_store() {
  source.assign(dynamic_shared + shared, dynamic_shared + shared + bytes);
  stores.push_back(*this);
}

inline bool run_loads(bool urgent) {
  static uint32_t random = 1;
  random = random * 1664525 + 1013904223;
  if (loads.empty() || (!urgent && random >> 30 != 0)) {
    return false;
  }
  const size_t chosen = (random >> 8) % loads.size();
  const Copy copy = loads[chosen];
  loads.erase(loads.begin() + chosen);
  copy.load();
  return true;
}

inline void check_idle() {
  if (!loads.empty() || !stores.empty()) {
    current = 0;
    fail("a block ended while copies were running");
  }
}

inline const bool engine_is_set = (engine = run_loads, end_of_block.push_back(check_idle), true);

inline cudaError_t entry_point(const char*, void** function, unsigned, uint64_t,
                               cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&encode);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

}  // namespace emulated
#define cudaGetDriverEntryPointByVersion emulated::entry_point

namespace fastattn::sm90 {

struct Coordinates {
  int col, row, head, batch;
};

template <typename... Maps>
void prefetch_maps(const Maps&...) {}

inline emulated::Copy tensor_copy(const CUtensorMap& map, Coordinates at, const void* shared, Barrier* barrier) {
  emulated::Copy copy{{}, at.col, at.row, at.head, at.batch, shared_address(shared), barrier, nullptr, 0};
  std::memcpy(&copy.map, &map, sizeof(copy.map));
  copy.bytes = static_cast<int>(copy.map.rows * copy.map.cols * 2);
  if (copy.shared % (copy.map.cols * 16) != 0) {
    emulated::fail("a tile in shared memory that does not begin with a swizzle atom");
  }
  return copy;
}

inline void tma_load(void* to, const CUtensorMap& map, Coordinates at, Barrier& barrier) {
  emulated::loads.push_back(tensor_copy(map, at, to, &barrier));
  std::memset(to, 0xff, emulated::loads.back().bytes);
}

inline void tma_store(const CUtensorMap& map, Coordinates at, const void* from) {
  tensor_copy(map, at, from, nullptr).issue_store();
}
inline void tma_reduce_add(const CUtensorMap& map, Coordinates at, const void* from) {
  tma_store(map, at, from);
  emulated::stores.back().adds = true;
}
inline void tma_stores_read() {
  for (int i = 0; i < 3; ++i) {  // gives other threads time to make mistakes
    emulated::wait(emulated::State::kRuns);
  }
  std::erase_if(emulated::stores, [thread = emulated::current](const emulated::Copy& copy) {
    if (copy.thread == thread) {
      copy.store();
    }
    return copy.thread == thread;
  });
}

inline void check_bulk(const void* shared, const void* global, int bytes) {
  if (shared_address(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0 || bytes % 16 != 0) {
    emulated::fail("a bulk copy that is not aligned to 16 bytes");
  }
}
inline void bulk_load(void* to, const void* from, int bytes, Barrier& barrier) {
  check_bulk(to, from, bytes);
  emulated::loads.push_back({{}, 0, 0, 0, 0, shared_address(to), &barrier, static_cast<const char*>(from), bytes});
  std::memset(to, 0xff, bytes);
}
inline void bulk_reduce_add(float* to, const void* from, int bytes) {
  check_bulk(from, to, bytes);
  emulated::Copy copy{{}, 0, 0, 0, 0, shared_address(from), nullptr, nullptr, bytes};
  copy.to = to;
  copy.issue_store();
}

}  // namespace fastattn::sm90
