// fastattn::attention_infer, attention_fwd and attention_bwd for CPU tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "attention_call.h"
#include "attention_run.h"
#include "dispatch.h"

namespace {

using fastattn::AttentionCpuArgs;
using fastattn::AttentionInputs;
using fastattn::AttentionOutputs;
using fastattn::DType;
using fastattn::kAttentionPieceKeys;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Call = fastattn::AttentionCall<AttentionCpuArgs, fastattn::inner_contiguous>;
using BackwardCall = fastattn::AttentionBackwardCall<AttentionCpuArgs, fastattn::inner_contiguous>;
using Kernel = void (*)(const AttentionCpuArgs&);

// Checks that cu_seqlens rises from 0 to at most `total` and returns the length of the longest sequence.
int64_t longest(const int32_t* cu_seqlens, int64_t batch, int64_t total, const char* name) {
  int64_t most = 0;
  for (int64_t b = 0; b < batch; ++b) {
    STD_TORCH_CHECK(cu_seqlens[b + 1] >= cu_seqlens[b], name, " must not decrease, got ", cu_seqlens[b + 1], " after ",
                    cu_seqlens[b]);
    most = std::max<int64_t>(most, cu_seqlens[b + 1] - cu_seqlens[b]);
  }
  STD_TORCH_CHECK(cu_seqlens[0] == 0 && cu_seqlens[batch] <= total, name, " must rise from 0 to at most ", total,
                  ", got ", cu_seqlens[0], " to ", cu_seqlens[batch]);
  return most;
}

// Writes `value` to the packed rows after the last sequence, which no kernel writes.
void fill_behind(Tensor t, const int32_t* cu_seqlens, int64_t batch, double value) {
  const int64_t end = cu_seqlens != nullptr ? cu_seqlens[batch] : t.size(2);
  if (end < t.size(2)) {
    torch::stable::fill_(torch::stable::narrow(t, 2, end, t.size(2) - end), value);
  }
}

// Checks the lengths of packed sequences and sets the longest ones.
void set_longest(Call& call) {
  AttentionCpuArgs& args = call.args;
  if (call.packed) {
    args.seqlen_q = longest(args.cu_seqlens_q, args.batch, call.q.size(2), "cu_seqlens_q");
    args.seqlen_k = longest(args.cu_seqlens_k, args.batch, call.k.size(2), "cu_seqlens_k");
  }
}

// Runs the kernel on torch's threads. Threads claim tasks from a shared counter.
void run(Kernel kernel, AttentionCpuArgs& args, int64_t tasks) {
  // The number of multiplications that justify waking a thread, which takes several microseconds.
  constexpr int64_t kLeastWork = 1 << 17;
  const int64_t work = args.batch * args.n_heads * args.seqlen_q * args.seqlen_k * (args.head_dim + args.head_dim_v) /
                       std::max<int64_t>(1, tasks);
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  args.next = &next;
  args.failed = &failed;
  torch::stable::parallel_for(0, tasks, kLeastWork / std::max<int64_t>(1, work) + 1,
                              [&](int64_t, int64_t) { kernel(args); });
  STD_TORCH_CHECK(!failed, "attention: out of memory");
}

// glibc returns blocks of this size to the kernel on free, so the next call faults them in again, page by page. That
// takes 17 ms for 32 MiB, or 4 ms with huge pages.
void advise_huge_pages(const Tensor& t) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 1 << 21, kNeverKept = 1 << 25;
  const uintptr_t start = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t begin = (start + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (start + t.numel() * t.element_size()) / kHugePage * kHugePage;
  if (end - start >= kNeverKept - kHugePage) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
}

constexpr int64_t blocks_of(int64_t n) {
  return (n + 63) / 64;
}

// True if each piece of a head's keys is a task. The answer depends on sizes only, never on the number of threads, so
// the results do not depend on the number of threads either.
bool has_task_per_piece(const AttentionCpuArgs& args) {
  constexpr int64_t kManyTasks = 8;
  const bool whole_batch = args.dbias_from == AttentionCpuArgs::DbiasFrom::kWholeBatch;
  return (whole_batch ? 1 : args.batch) * args.n_kv_heads < kManyTasks && args.seqlen_k > kAttentionPieceKeys;
}

}  // namespace

namespace fastattn {

void run_attention_fwd(AttentionCpuArgs& args) {
  run(FASTATTN_SELECT_CPU_TILES(attention_fwd, args.dtype), args, args.batch * args.n_heads * blocks_of(args.seqlen_q));
}

void run_attention_bwd(AttentionCpuArgs& args) {
  args.piece_per_task = has_task_per_piece(args);
  const bool in_place = args.dtype == DType::kFloat32;
  const int64_t query_tasks = args.batch * args.n_heads * blocks_of(args.seqlen_q);
  std::vector<std::atomic<int32_t>> dq_turns(args.piece_per_task && in_place ? query_tasks : 0);
  args.dq_turns = dq_turns.data();
  const int64_t pieces = args.piece_per_task ? (args.seqlen_k + kAttentionPieceKeys - 1) / kAttentionPieceKeys : 1;
  run(FASTATTN_SELECT_CPU_TILES(attention_bwd, args.dtype), args, args.batch * args.n_kv_heads * pieces);
  if (args.piece_per_task && !in_place) {
    run(FASTATTN_SELECT_CPU_TILES(attention_dq, args.dtype), args, query_tasks);
  }
}

}  // namespace fastattn

namespace {

// Computes out, and both parts of lse if there is memory for them.
Tensor forward(Call& call, const Tensor& q_in, float* lse, float* lse_low) {
  set_longest(call);
  AttentionCpuArgs& args = call.args;
  const Tensor out = fastattn::empty_in_layout(q_in, args.head_dim_v);
  args.out = fastattn::heads(out, call.packed);
  args.lse = lse;
  args.lse_low = lse_low;
  fastattn::run_attention_fwd(args);
  fill_behind(out, args.cu_seqlens_q, args.batch, 0);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                                 AttentionInputs inputs, bool need_low) {
  Call call(q, k, v, std::move(inputs));
  const Tensor lse = fastattn::empty_beside(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  const Tensor lse_low = need_low ? fastattn::empty_beside(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float)
                                  : fastattn::empty_beside(q, {0}, ScalarType::Float);
  const Tensor out = forward(call, q, static_cast<float*>(lse.mutable_data_ptr()),
                             need_low ? static_cast<float*>(lse_low.mutable_data_ptr()) : nullptr);
  if (call.packed) {
    fill_behind(lse, call.args.cu_seqlens_q, call.args.batch, -INFINITY);
    if (need_low) {
      fill_behind(lse_low, call.args.cu_seqlens_q, call.args.batch, 0);
    }
  }
  return {out, lse, lse_low};
}

Tensor attention_infer(const Tensor& q, const Tensor& k, const Tensor& v, int64_t window_right, bool top_left,
                       double scale) {
  AttentionInputs in{};
  in.window_left = -1;
  in.window_right = window_right;
  in.top_left = top_left;
  in.scale = scale;
  Call call(q, k, v, std::move(in));
  return forward(call, q, nullptr, nullptr);
}

// True if one task may sum the dbias of a whole batch: in place for fp32, in a buffer of its thread for 16-bit dtypes.
bool dbias_sum_fits(const AttentionCpuArgs& args) {
  constexpr int64_t kMostFloats = 1 << 21;
  return args.bias_dtype == DType::kFloat32 ||
         args.n_heads / args.n_kv_heads * args.seqlen_q * args.seqlen_k <= kMostFloats;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_bwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                                                 const AttentionOutputs& outputs,
                                                                 AttentionInputs inputs, bool need_dbias,
                                                                 bool) {  // deterministic: the CPU backward always is
  BackwardCall call(q, k, v, outputs, std::move(inputs));
  set_longest(call);
  AttentionCpuArgs& args = call.args;
  const AttentionInputs& in = call.in;
  const Tensor dsink = torch::stable::new_zeros(q, {in.sink ? args.n_heads : 0}, ScalarType::Float);
  const int64_t full = args.batch * args.n_heads * args.seqlen_q * args.seqlen_k;
  Tensor dbias = need_dbias ? torch::stable::new_empty(*in.bias, in.bias->sizes()) : torch::stable::new_empty(q, {0});
  if (need_dbias && full) {
    advise_huge_pages(dbias);
    args.dbias = fastattn::score_tensor(dbias);
    if (dbias.numel() == full) {
      args.dbias_from = AttentionCpuArgs::DbiasFrom::kSequence;
    } else if (dbias.numel() * args.batch == full && dbias.size(0) == 1 && dbias_sum_fits(args)) {
      args.dbias_from = AttentionCpuArgs::DbiasFrom::kWholeBatch;
    } else {
      args.dbias_from = AttentionCpuArgs::DbiasFrom::kOwnPass;
    }
  }
  const Tensor dsink_partial =
      torch::stable::new_zeros(q, {in.sink ? args.batch * args.n_heads : 0}, ScalarType::Float);
  args.dsink_partial = in.sink ? static_cast<float*>(dsink_partial.mutable_data_ptr()) : nullptr;
  fastattn::run_attention_bwd(args);
  if (need_dbias && full == 0) {
    torch::stable::zero_(dbias);
  } else if (need_dbias && args.dbias_from == AttentionCpuArgs::DbiasFrom::kOwnPass) {
    const int64_t parts = std::max<int64_t>(dbias.size(2) > 1 ? blocks_of(args.seqlen_q) : 1,
                                            dbias.size(3) > 1 ? blocks_of(args.seqlen_k) : 1);
    run(FASTATTN_SELECT_CPU_TILES(attention_dbias, args.dtype), args, dbias.size(0) * dbias.size(1) * parts);
  }
  fill_behind(call.dq, args.cu_seqlens_q, args.batch, 0);
  fill_behind(call.dk, args.cu_seqlens_k, args.batch, 0);
  fill_behind(call.dv, args.cu_seqlens_k, args.batch, 0);
  if (in.sink) {
    float* sums = static_cast<float*>(dsink.mutable_data_ptr());
    for (int64_t h = 0; h < args.n_heads; ++h) {
      double total = 0;  // in fp64, because the sum may have many terms
      for (int64_t b = 0; b < args.batch; ++b) {
        total += args.dsink_partial[b * args.n_heads + h];
      }
      sums[h] = static_cast<float>(total);
    }
  }
  return {call.dq, call.dk, call.dv, dbias, dsink};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("attention_infer.native", TORCH_BOX(&attention_infer));
  m.impl("attention_fwd.native", TORCH_BOX(&fastattn::attention_fwd_op<attention_fwd>));
  m.impl("attention_fwd_native", TORCH_BOX(&fastattn::attention_fwd_op<attention_fwd>));
  m.impl("attention_bwd.native", TORCH_BOX(&fastattn::attention_bwd_op<attention_bwd>));
}
