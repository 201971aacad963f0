#pragma once
// Shared by the attention kernels for Hopper: loads of tiles, products, masks, stores of tiles.
#include "cuda/sm90/attention_tiles.cuh"
#include "cuda/sm90/pipe.cuh"
#include "cuda/sm90/tma.cuh"
#include "cuda/sm90/warpgroup.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace fastattn::sm90 {

constexpr int kSlab = 64;  // the rows of a tile for one warpgroup

struct Idle {
  __device__ __forceinline__ void operator()(int) const {}
};

// The frame of the kernels. Warp 0 of warpgroup 0 loads, and its warps 1 to 3 call help(0) to help(2). The other
// warpgroups compute and take the registers that warpgroup 0 gives up.
template <int kProducerRegisters, int kConsumerRegisters, typename Produce, typename Consume, typename Help = Idle>
__device__ __forceinline__ void assign_roles(Produce produce, Consume consume, Help help = {}) {
  // The value is read from lane 0. So the compiler knows that all lanes have the same value, and computes addresses
  // once.
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / kWarpgroup), 0);
  if (warpgroup == 0) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x < 32) {
      produce();
    } else {
      help(static_cast<int>(threadIdx.x / 32) - 1);
    }
  } else {
    take_registers<kConsumerRegisters>();
    consume(warpgroup - 1);
  }
}

// Executed by whole warps. Completes the arithmetic that `never` depends on before anything that follows. `never` must
// be false for every input, NaN included. This is needed because wgmma_wait does not order arithmetic on registers that
// no product uses, and ptxas moves the wait to the front. A vote with a trap ends the basic block, and ptxas moves no
// wait over that.
__device__ __forceinline__ void finish_first(bool never) {
  if (__any_sync(0xffffffffu, never)) {
    __trap();
  }
}

// kGroups warpgroups take turns at the tensor cores: while one issues its products, the others compute. Each warpgroup
// calls start, then alternates wait and pass, and finally calls end. All must take the same number of turns. They use
// barriers kFirst to kFirst + kGroups - 1; each warpgroup waits at its own barrier for the preceding warpgroup.
template <int kGroups, int kFirst>
struct Turns {
  static constexpr int kThreads = 2 * kWarpgroup;
  int group;

  __device__ __forceinline__ void start() const {
    if (group == kGroups - 1) {
      arrive(kFirst, kThreads);  // warpgroup 0 has the first turn
    }
  }
  __device__ __forceinline__ void wait() const { meet(kFirst + group, kThreads); }
  __device__ __forceinline__ void pass() const { arrive(group == kGroups - 1 ? kFirst : kFirst + 1 + group, kThreads); }
  __device__ __forceinline__ void end() const {
    if (group == 0) {
      meet(kFirst, kThreads);  // matches the last pass
    }
  }
};

// The tiles of a block of threads. The first tile of a block has the block's index. Each later one comes from a counter
// that all blocks share and that starts at 0. Without a counter, each block has one tile. The loading warp takes tiles
// ahead of the other warps, as far as its stages allow, and passes on those that exist.
struct TileQueue {
  Pipe<2> pipe;
  uint32_t index[2];
};

// Called by the loading warp. Calls body(tile) for every tile of this block.
template <typename Tile, typename Body>
__device__ __forceinline__ void take_tiles(TileQueue& queue, uint32_t* counter, const AttentionShape& shape,
                                           const TileOrder& order, Body body) {
  const bool leader = threadIdx.x % 32 == 0;
  Ring<2> ring;
  uint32_t index = blockIdx.x;
  const auto pass_on = [&] {
    queue.pipe.wait_empty(ring);
    if (leader) {
      queue.index[ring.stage] = index;
      queue.pipe.full[ring.stage].arrive();
    }
    ring.next();
  };
  while (index < order.count()) {
    const Tile tile(shape, order, index);
    if (tile.exists()) {
      pass_on();
      body(tile);
    }
    index =
        counter == nullptr ? UINT32_MAX : __shfl_sync(0xffffffffu, leader ? gridDim.x + atomicAdd(counter, 1u) : 0, 0);
  }
  pass_on();  // signals the end
}

// Called by the other warps. Calls body(tile) for the same tiles.
template <typename Tile, typename Body>
__device__ __forceinline__ void follow_tiles(TileQueue& queue, const AttentionShape& shape, const TileOrder& order,
                                             Body body) {
  Ring<2> ring;
  while (true) {
    queue.pipe.wait_full(ring);
    const uint32_t index = queue.index[ring.stage];
    queue.pipe.release(ring.stage);
    ring.next();
    if (index >= order.count()) {
      return;
    }
    body(Tile(shape, order, index));
  }
}

template <typename T, int kRows, int kHeadDim>
struct alignas(kAlignment) TileOf {
  static constexpr int kPanel = panel_cols(kHeadDim);
  static constexpr int kBytes = kRows * kHeadDim * 2;
  static constexpr int kSlabBytes = kSlab * kRowBytes<kPanel>;  // the bytes of a slab of one panel
  unsigned char bytes[kBytes];

  __device__ __forceinline__ uint32_t address() const { return shared_address(bytes); }
  // Returns the address of a warpgroup's rows in the first panel. Their offset is the same in every panel.
  __device__ __forceinline__ uint32_t slab_address(int slab) const { return address() + slab * kSlabBytes; }
  __device__ __forceinline__ uint32_t panel_address(int panel) const {
    return address() + panel * kRows * kRowBytes<kPanel>;
  }

  // Executed by one thread. Copies rows from `row` on.
  __device__ __forceinline__ void load(const CUtensorMap& map, int row, int head, int batch, Barrier& barrier) {
#pragma unroll
    for (int col = 0; col < kHeadDim; col += kPanel) {
      tma_load(bytes + col * 2 * kRows, map, {col, row, head, batch}, barrier);
    }
  }

  // Executed by one warp. Writes zeros from row `valid` on, or everywhere if it is negative. The copied data there
  // belongs to another sequence and may be NaN, and zero times NaN is NaN.
  __device__ __forceinline__ void clear_from(int valid) {
    constexpr int kChunks = kPanel / 8;  // the 16-byte chunks of a row
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int row = larger(0, valid) + lane / kChunks; row < kRows; row += 32 / kChunks) {
#pragma unroll
      for (int col = 0; col < kHeadDim; col += kPanel) {
        store_for_async(bytes + col * 2 * kRows + row * kRowBytes<kPanel> + lane % kChunks * 16, uint4{0, 0, 0, 0});
      }
    }
  }
};

// d = A * Bᵀ. A is 64 rows at address `a` of a tile of kRowsA rows. B is as many rows as d has columns, at address `b`
// of a tile of kRowsB rows. Issues the product without waiting for it.
template <typename T, int kHeadDim, int kRowsA, int kRowsB, int kAccumulators>
__device__ __forceinline__ void issue_abt(float (&d)[kAccumulators], uint32_t a, uint32_t b) {
  constexpr int kPanel = panel_cols(kHeadDim);
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    wgmma_ss<T>(d, k_major<kPanel>(a, kRowsA, step), k_major<kPanel>(b, kRowsB, step), step > 0);
  }
  wgmma_commit();
}

// d += A * B, with A in registers and B as many rows at address `b` of a tile of kRowsB rows. Issues the product
// without waiting for it.
template <typename T, int kRowsB, int kSteps, int kAccumulators>
__device__ __forceinline__ void issue_ab(float (&d)[kAccumulators], const uint32_t (&a)[kSteps][4], uint32_t b) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    wgmma_rs<T>(d, a[step], mn_major<panel_cols(2 * kAccumulators)>(b, kRowsB, step));
  }
  wgmma_commit();
}

// d = Aᵀ * B for tiles of kRows rows. A has 64 columns, B as many as d. Issues the product without waiting for it.
template <typename T, int kRows, int kAccumulators>
__device__ __forceinline__ void issue_atb(float (&d)[kAccumulators], uint32_t a, uint32_t b) {
#pragma unroll
  for (int step = 0; step < kRows / 16; ++step) {
    wgmma_ss<T, true>(d, mn_major<64>(a, kRows, step), mn_major<panel_cols(2 * kAccumulators)>(b, kRows, step),
                      step > 0);
  }
  wgmma_commit();
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, sizeof(word));
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, sizeof(word));
  }
  return word;
}

// Returns the accumulators, rounded, as the A operand of a product over their columns.
template <typename T, int kSteps>
__device__ __forceinline__ void to_operand(uint32_t (&a)[kSteps][4], const float* s) {
#pragma unroll
  for (int i = 0; i < kSteps * 4; ++i) {
    a[i / 4][i % 4] = pack<T>(s[2 * i], s[2 * i + 1]);
  }
}

// Sets the elements that the band hides to `value`. The thread's rows have the positions row_at(0) and row_at(1). The
// first column of the tile has position `col` on the other side.
template <int kAccumulators, typename RowAt>
__device__ __forceinline__ void mask_rows(float (&s)[kAccumulators], const Band& band, RowAt row_at, int col,
                                          float value) {
  int low[2], high[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int x = row_at(r);
    const int first = col + accumulator_col(threadIdx.x % kWarpgroup, 0);
    low[r] = band.low(x) - first;
    high[r] = band.high(x) - first;
  }
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) {
    const int c = accumulator_col(0, i);
    s[i] = c < low[row_of(i)] || c > high[row_of(i)] ? value : s[i];
  }
}
// The same if the first row of the tile has position `row`.
template <int kAccumulators>
__device__ __forceinline__ void mask(float (&s)[kAccumulators], const Band& band, int row, int col, float value) {
  const int thread = threadIdx.x % kWarpgroup;
  mask_rows(s, band, [&](int r) { return row + accumulator_row(thread, 2 * r); }, col, value);
}

// The sum over the four threads that share a row. The next function returns their maximum.
__device__ __forceinline__ float row_total(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}
__device__ __forceinline__ float row_maximum(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

// Turns the scores of a block of keys into p and updates the sums. shrink is the factor for what was summed before.
template <bool kMasked, int kScores>
__device__ __forceinline__ void softmax_step(float (&s)[kScores], float (&row_max)[2], float (&row_sum)[2],
                                             float (&shrink)[2], float scale_log2) {
  float next[2] = {row_max[0], row_max[1]};
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    next[row_of(i)] = fmaxf(next[row_of(i)], s[i]);
  }
  float shift[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    next[r] = row_maximum(next[r]);
    // A row that has seen nothing yet has maximum -inf and subtracts 0, because -inf - -inf is NaN.
    shift[r] = kMasked && next[r] == -INFINITY ? 0.f : next[r] * scale_log2;
    shrink[r] = exp2_fast(row_max[r] * scale_log2 - shift[r]);
    row_max[r] = next[r];
    row_sum[r] *= shrink[r];
  }
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    s[i] = exp2_fast(s[i] * scale_log2 - shift[row_of(i)]);
    row_sum[row_of(i)] += s[i];
  }
}

// Where the 64 rows of a warpgroup's result are written.
struct Target {
  const CUtensorMap& map;  // its boxes have 64 rows
  const HeadTensor& rows;
  Coordinates at;
  int valid;  // the number of rows to write; more than 64 counts as 64
  // Whether the rows past `valid` are outside the tensor, where the copy engine does not write.
  bool clipped;
};

// Executed by one warpgroup. Writes its accumulators through its rows of a tile of kRows rows, which it must own. The
// rows may be overwritten after await_stores() and a barrier.
template <typename T, int kHeadDim, int kRows>
__device__ __forceinline__ void store_slab(const float (&acc)[kHeadDim / 2], TileOf<T, kRows, kHeadDim>& tile, int slab,
                                           const Target& to, int barrier) {
  const int thread = threadIdx.x % kWarpgroup;
  constexpr int kPanel = panel_cols(kHeadDim);
  unsigned char* rows = tile.bytes + slab * tile.kSlabBytes;
  const int first = first_offset<kPanel>(thread);
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; i += 2) {
    store_for_async(rows + accumulator_offset<kPanel>(first, i, kRows), pack<T>(acc[i], acc[i + 1]));
  }
  fence_async();
  meet(barrier, kWarpgroup);
  if (to.clipped || to.valid >= kSlab) {
    if (thread == 0) {
#pragma unroll
      for (int col = 0; col < kHeadDim; col += kPanel) {
        tma_store(to.map, {col, to.at.row, to.at.head, to.at.batch}, rows + col * 2 * kRows);
      }
    }
  } else {
    T* first = static_cast<T*>(to.rows.data) + to.at.batch * to.rows.batch + to.at.head * to.rows.head;
    for (int chunk = thread; chunk < to.valid * (kHeadDim / 8); chunk += kWarpgroup) {
      const int row = chunk / (kHeadDim / 8), col = chunk % (kHeadDim / 8) * 8;
      *reinterpret_cast<uint4*>(first + (to.at.row + row) * to.rows.row + col) =
          *reinterpret_cast<const uint4*>(rows + tile_offset<kPanel>(row, col, kRows));
    }
  }
}

__device__ __forceinline__ void await_stores() {
  if (threadIdx.x % kWarpgroup == 0) {
    tma_stores_read();
  }
}

}  // namespace fastattn::sm90
