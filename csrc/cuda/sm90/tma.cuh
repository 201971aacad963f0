#pragma once
// Copies between global and shared memory by the copy engine, issued by one thread. PTX ISA: cp.async.bulk.tensor,
// cp.async.bulk, cp.reduce.async.bulk.tensor, cp.reduce.async.bulk, cp.async.bulk.commit_group, .wait_group,
// prefetch.tensormap.
//
// A tensor map describes a (cols, rows, heads, batch) tensor and a box of columns and rows. Elements outside the tensor
// are read as zero and not written. Addresses in shared memory are multiples of 1024 bytes (tensor) or 16 bytes
// (plain).
#include <cuda.h>  // CUtensorMap

#include "cuda/sm90/mbarrier.cuh"

namespace fastattn::sm90 {

struct Coordinates {
  int col, row, head, batch;
};

// Called by one thread at the start, so that the first copy does not wait for its map.
template <typename... Maps>
__device__ __forceinline__ void prefetch_maps(const Maps&... maps) {
  (..., [](const CUtensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }(maps));
}

__device__ __forceinline__ void tma_load(void* to, const CUtensorMap& map, Coordinates at, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}],"
      " [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(at.col), "r"(at.row), "r"(at.head), "r"(at.batch)
      : "memory");
}

// A copy to global memory reads shared memory until tma_stores_read() returns in the thread that issued it.
__device__ __forceinline__ void tma_store(const CUtensorMap& map, Coordinates at, const void* from) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(shared_address(from)), "r"(at.col), "r"(at.row), "r"(at.head), "r"(at.batch)
               : "memory");
}
// Adds elements of the map's type. If several blocks of threads add, the order is undefined.
__device__ __forceinline__ void tma_reduce_add(const CUtensorMap& map, Coordinates at, const void* from) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
      "r"(shared_address(from)), "r"(at.col), "r"(at.row), "r"(at.head), "r"(at.batch)
      : "memory");
}
__device__ __forceinline__ void tma_stores_read() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Copies `bytes` bytes, a multiple of 16, from global to shared memory.
__device__ __forceinline__ void bulk_load(void* to, const void* from, int bytes, Barrier& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
}

// Adds `bytes` bytes of floats, a multiple of 16, to global memory, like tma_reduce_add but without a map.
__device__ __forceinline__ void bulk_reduce_add(float* to, const void* from, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}

}  // namespace fastattn::sm90
