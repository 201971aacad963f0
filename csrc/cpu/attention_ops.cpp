// fastattn::attention_infer, attention_fwd and attention_bwd for CPU tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>
#include <vector>

#include "attention_tensors.h"
#include "dispatch.h"

namespace {

using fastattn::AttentionArgs;
using fastattn::contiguous;
using fastattn::DType;
using fastattn::dtype_of;
using fastattn::empty_in_layout;
using fastattn::heads;
using fastattn::inner_contiguous;
using fastattn::kAttentionPieceKeys;
using fastattn::OptionalTensor;
using fastattn::ScoreTensor;
using fastattn::vector_data;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Kernel = void (*)(const AttentionArgs&);

// Dimensions of size 1 become stride 0.
ScoreTensor scores(const Tensor& t) {
  const auto stride = [&](int64_t d) { return t.size(d) == 1 ? 0 : t.stride(d); };
  return {t.const_data_ptr(), stride(0), stride(1), stride(2), stride(3)};
}

void check_scores(const Tensor& t, const AttentionArgs& args, const char* name) {
  const std::array<int64_t, 4> full{args.batch, args.n_heads, args.seqlen_q, args.seqlen_k};
  STD_TORCH_CHECK(t.dim() == 4, name, " must have 4 dimensions, got ", t.dim());
  for (int d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(t.size(d) == full[d] || t.size(d) == 1, name, " must have size 1 or ", full[d], " in dimension ", d,
                    ", got ", t.size(d));
  }
}

// cu_seqlens rises from 0 to at most total; the longest sequence
int64_t longest(const int32_t* cu_seqlens, int64_t batch, int64_t total, const char* name) {
  int64_t most = 0;
  for (int64_t b = 0; b < batch; ++b) {
    STD_TORCH_CHECK(cu_seqlens[b + 1] >= cu_seqlens[b], name, " must not fall, got ", cu_seqlens[b + 1], " after ",
                    cu_seqlens[b]);
    most = std::max<int64_t>(most, cu_seqlens[b + 1] - cu_seqlens[b]);
  }
  STD_TORCH_CHECK(cu_seqlens[0] == 0 && cu_seqlens[batch] <= total, name, " must rise from 0 to at most ", total,
                  ", got ", cu_seqlens[0], " to ", cu_seqlens[batch]);
  return most;
}

// `value` in the packed rows behind the last sequence, which no kernel writes
void fill_behind(Tensor t, const int32_t* cu_seqlens, int64_t batch, double value) {
  const int64_t end = cu_seqlens != nullptr ? cu_seqlens[batch] : t.size(2);
  if (end < t.size(2)) {
    torch::stable::fill_(torch::stable::narrow(t, 2, end, t.size(2) - end), value);
  }
}

// The optional inputs as contiguous tensors, kept alive for the call.
struct Inputs {
  OptionalTensor bias, sink, mask, seqlens_k, cu_seqlens_q, cu_seqlens_k, alibi_slopes, rng;
  int64_t window_left, window_right;
  bool top_left;
  double softcap, dropout_p, scale;
};

// Everything but the outputs, checked.
AttentionArgs arguments(const Tensor& q, const Tensor& k, const Tensor& v, Inputs& in) {
  fastattn::check_qkv(q, k, v);
  for (OptionalTensor* t : {&in.sink, &in.seqlens_k, &in.cu_seqlens_q, &in.cu_seqlens_k, &in.alibi_slopes, &in.rng}) {
    *t = contiguous(*t);
  }
  const bool packed = in.cu_seqlens_q.has_value();
  AttentionArgs args{};
  args.dtype = dtype_of(q, "q");
  args.batch = packed ? in.cu_seqlens_q->numel() - 1 : q.size(0);
  args.n_heads = q.size(1);
  args.n_kv_heads = k.size(1);
  args.seqlen_q = q.size(2);
  args.seqlen_k = k.size(2);
  args.head_dim = q.size(3);
  args.head_dim_v = v.size(3);
  if (packed) {
    STD_TORCH_CHECK(q.size(0) == 1 && !in.mask && !in.bias,
                    "attention: packed sequences have batch 1, no mask or bias");
    args.cu_seqlens_q = vector_data<int32_t>(in.cu_seqlens_q, ScalarType::Int, args.batch + 1, "cu_seqlens_q");
    args.cu_seqlens_k = vector_data<int32_t>(in.cu_seqlens_k, ScalarType::Int, args.batch + 1, "cu_seqlens_k");
    args.lse_head = args.seqlen_q;
    args.seqlen_q = longest(args.cu_seqlens_q, args.batch, args.seqlen_q, "cu_seqlens_q");
    args.seqlen_k = longest(args.cu_seqlens_k, args.batch, args.seqlen_k, "cu_seqlens_k");
  } else {
    args.lse_head = args.seqlen_q;
    args.lse_batch = args.n_heads * args.seqlen_q;
  }
  if (in.mask) {
    check_scores(*in.mask, args, "mask");
    STD_TORCH_CHECK(in.mask->scalar_type() == ScalarType::Bool, "mask must be bool");
    args.mask = scores(*in.mask);
  }
  if (in.bias) {
    check_scores(*in.bias, args, "bias");
    args.bias_dtype = dtype_of(*in.bias, "bias");
    args.bias = scores(*in.bias);
  }
  args.seqlens_k = vector_data<int32_t>(in.seqlens_k, ScalarType::Int, args.batch, "seqlens_k");
  args.sink = vector_data<float>(in.sink, ScalarType::Float, args.n_heads, "sink");
  if (in.alibi_slopes) {
    args.alibi_batch = in.alibi_slopes->dim() == 2 ? args.n_heads : 0;
    args.alibi_slopes = vector_data<float>(in.alibi_slopes, ScalarType::Float,
                                           args.n_heads * (args.alibi_batch ? args.batch : 1), "alibi_slopes");
  }
  constexpr int64_t kFar = int64_t{1} << 40;  // as good as unlimited, and sums with it do not overflow
  args.window_left = std::min(in.window_left, kFar);
  args.window_right = std::min(in.window_right, kFar);
  args.top_left = in.top_left;
  args.softcap = static_cast<float>(in.softcap);
  args.scale = static_cast<float>(in.scale);
  args.dropout = fastattn::dropout_args(in.rng, in.dropout_p);
  return args;
}

// Runs the kernel on torch's threads. They take tasks from a common counter, the first free one the next.
void run(Kernel kernel, AttentionArgs& args, int64_t tasks) {
  constexpr int64_t kLeastWork = 1 << 17;  // multiplications that are worth waking a thread: some microseconds
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

// malloc gives blocks of this size back to the system whenever they are freed, and page by page anew to the next call:
// 17 ms for 32 MiB, 4 ms in huge pages.
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

// out, and both parts of lse where there is room for them
Tensor forward(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, Inputs in, float* lse, float* lse_low) {
  const Tensor q = inner_contiguous(q_in), k = inner_contiguous(k_in), v = inner_contiguous(v_in);
  AttentionArgs args = arguments(q, k, v, in);
  const bool packed = args.cu_seqlens_q;
  const Tensor out = empty_in_layout(q_in, v.size(3));
  args.q = heads(q, packed);
  args.k = heads(k, packed);
  args.v = heads(v, packed);
  args.out = heads(out, packed);
  args.lse = lse;
  args.lse_low = lse_low;
  run(FASTATTN_SELECT_CPU_BF16(attention_fwd, args.dtype), args, args.batch * args.n_heads * blocks_of(args.seqlen_q));
  fill_behind(out, args.cu_seqlens_q, args.batch, 0);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor bias,
                                                 OptionalTensor sink, OptionalTensor mask, OptionalTensor seqlens_k,
                                                 OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
                                                 OptionalTensor alibi_slopes, OptionalTensor rng, int64_t, int64_t,
                                                 int64_t window_left, int64_t window_right, bool top_left,
                                                 double softcap, double dropout_p, double scale, bool need_low) {
  const int64_t rows = std::max<int64_t>(1, q.size(2));
  const std::array<int64_t, 3> sizes{q.size(0), q.size(1), q.size(2)};
  const std::array<int64_t, 3> strides{std::max<int64_t>(1, q.size(1)) * rows, rows, 1};
  const Tensor lse = fastattn::empty_strided(q, sizes, strides, ScalarType::Float);
  const Tensor lse_low = need_low ? fastattn::empty_strided(q, sizes, strides, ScalarType::Float)
                                  : fastattn::empty_strided<1>(q, {0}, {1}, ScalarType::Float);
  const Tensor out = forward(q, k, v,
                             {bias, sink, mask, seqlens_k, cu_seqlens_q, cu_seqlens_k, alibi_slopes, rng, window_left,
                              window_right, top_left, softcap, dropout_p, scale},
                             static_cast<float*>(lse.mutable_data_ptr()),
                             need_low ? static_cast<float*>(lse_low.mutable_data_ptr()) : nullptr);
  if (cu_seqlens_q) {
    const OptionalTensor ends = contiguous(cu_seqlens_q);
    const auto* cu_seqlens = static_cast<const int32_t*>(ends->const_data_ptr());
    fill_behind(lse, cu_seqlens, ends->numel() - 1, -INFINITY);
    if (need_low) {
      fill_behind(lse_low, cu_seqlens, ends->numel() - 1, 0);
    }
  }
  return {out, lse, lse_low};
}

Tensor attention_infer(const Tensor& q, const Tensor& k, const Tensor& v, int64_t window_right, bool top_left,
                       double scale) {
  Inputs in{};
  in.window_left = -1;
  in.window_right = window_right;
  in.top_left = top_left;
  in.scale = scale;
  return forward(q, k, v, in, nullptr, nullptr);
}

// Whether a task may sum the dbias of a whole batch: in fp32 where it ends up, in 16 bits in memory of the thread.
bool dbias_sum_fits(const AttentionArgs& args) {
  constexpr int64_t kMostFloats = 1 << 21;
  return args.bias_dtype == DType::kFloat32 ||
         args.n_heads / args.n_kv_heads * args.seqlen_q * args.seqlen_k <= kMostFloats;
}

// Whether tasks are pieces of a head's keys. Depends on sizes alone, never on the number of threads, so that results do
// not either.
bool splits_keys(const AttentionArgs& args) {
  constexpr int64_t kManyTasks = 8;
  const bool whole_batch = args.dbias_from == AttentionArgs::DbiasFrom::kWholeBatch;
  return (whole_batch ? 1 : args.batch) * args.n_kv_heads < kManyTasks && args.seqlen_k > kAttentionPieceKeys;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_bwd(
    OptionalTensor dout, OptionalTensor dlse, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
    const Tensor& out_in, const Tensor& lse_in, const Tensor& lse_low_in, OptionalTensor bias, OptionalTensor sink,
    OptionalTensor mask, OptionalTensor seqlens_k, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
    OptionalTensor alibi_slopes, OptionalTensor rng, int64_t, int64_t, int64_t window_left, int64_t window_right,
    bool top_left, double softcap, double dropout_p, double scale, bool need_dbias,
    bool) {  // deterministic: it always is
  const Tensor q = inner_contiguous(q_in), k = inner_contiguous(k_in), v = inner_contiguous(v_in),
               out = inner_contiguous(out_in),
               d_o = dout ? inner_contiguous(*dout) : torch::stable::new_zeros(out, out.sizes()),
               lse = *contiguous(OptionalTensor(lse_in)), lse_low = *contiguous(OptionalTensor(lse_low_in));
  dlse = contiguous(dlse);
  Inputs in{bias, sink,        mask,         seqlens_k, cu_seqlens_q, cu_seqlens_k, alibi_slopes,
            rng,  window_left, window_right, top_left,  softcap,      dropout_p,    scale};
  AttentionArgs args = arguments(q, k, v, in);
  const bool packed = args.cu_seqlens_q;
  const int64_t rows = q.size(0) * q.size(1) * q.size(2);
  STD_TORCH_CHECK(out.dim() == 4 && d_o.dim() == 4 && out.numel() == rows * v.size(3) && d_o.numel() == out.numel() &&
                      lse.numel() == rows && (lse_low.numel() == 0 || lse_low.numel() == rows) &&
                      (!dlse || dlse->numel() == rows),
                  "attention: do, dlse, out, lse and lse_low do not fit q and v");
  STD_TORCH_CHECK(d_o.scalar_type() == q.scalar_type() && out.scalar_type() == q.scalar_type() &&
                      lse.scalar_type() == ScalarType::Float && lse_low.scalar_type() == ScalarType::Float &&
                      (!dlse || dlse->scalar_type() == ScalarType::Float),
                  "attention: do and out must have the dtype of q, lse, lse_low and dlse float32");
  const Tensor dq = empty_in_layout(q_in, q.size(3)), dk = empty_in_layout(k_in, k.size(3)),
               dv = empty_in_layout(v_in, v.size(3));
  const Tensor dsink = torch::stable::new_zeros(q, {in.sink ? args.n_heads : 0}, ScalarType::Float);
  args.q = heads(q, packed);
  args.k = heads(k, packed);
  args.v = heads(v, packed);
  args.out = heads(out, packed);
  args.dout = heads(d_o, packed);
  args.dq = heads(dq, packed);
  args.dk = heads(dk, packed);
  args.dv = heads(dv, packed);
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  args.lse_low = lse_low.numel() ? static_cast<float*>(lse_low.mutable_data_ptr()) : nullptr;
  args.dlse = dlse ? static_cast<const float*>(dlse->const_data_ptr()) : nullptr;
  const int64_t full = args.batch * args.n_heads * args.seqlen_q * args.seqlen_k;
  Tensor dbias = need_dbias ? torch::stable::new_empty(*in.bias, in.bias->sizes()) : torch::stable::new_empty(q, {0});
  if (need_dbias && full) {
    advise_huge_pages(dbias);
    args.dbias = scores(dbias);
    if (dbias.numel() == full) {
      args.dbias_from = AttentionArgs::DbiasFrom::kSequence;
    } else if (dbias.numel() * args.batch == full && dbias.size(0) == 1 && dbias_sum_fits(args)) {
      args.dbias_from = AttentionArgs::DbiasFrom::kWholeBatch;
    } else {
      args.dbias_from = AttentionArgs::DbiasFrom::kOwnPass;
    }
  }
  const Tensor dsink_partial =
      torch::stable::new_zeros(q, {in.sink ? args.batch * args.n_heads : 0}, ScalarType::Float);
  args.dsink_partial = in.sink ? static_cast<float*>(dsink_partial.mutable_data_ptr()) : nullptr;
  args.split = splits_keys(args);
  const bool in_place = args.dtype == DType::kFloat32;
  const int64_t query_tasks = args.batch * args.n_heads * blocks_of(args.seqlen_q);
  std::vector<std::atomic<int32_t>> dq_turns(args.split && in_place ? query_tasks : 0);
  args.dq_turns = dq_turns.data();

  const int64_t pieces = args.split ? (args.seqlen_k + kAttentionPieceKeys - 1) / kAttentionPieceKeys : 1;
  run(FASTATTN_SELECT_CPU_BF16(attention_bwd, args.dtype), args, args.batch * args.n_kv_heads * pieces);
  if (args.split && !in_place) {
    run(FASTATTN_SELECT_CPU_BF16(attention_dq, args.dtype), args, query_tasks);
  }
  if (need_dbias && full == 0) {
    torch::stable::zero_(dbias);
  } else if (need_dbias && args.dbias_from == AttentionArgs::DbiasFrom::kOwnPass) {
    const int64_t parts = std::max<int64_t>(dbias.size(2) > 1 ? blocks_of(args.seqlen_q) : 1,
                                            dbias.size(3) > 1 ? blocks_of(args.seqlen_k) : 1);
    run(FASTATTN_SELECT_CPU_BF16(attention_dbias, args.dtype), args, dbias.size(0) * dbias.size(1) * parts);
  }
  fill_behind(dq, args.cu_seqlens_q, args.batch, 0);
  fill_behind(dk, args.cu_seqlens_k, args.batch, 0);
  fill_behind(dv, args.cu_seqlens_k, args.batch, 0);
  if (in.sink) {
    float* sums = static_cast<float*>(dsink.mutable_data_ptr());
    for (int64_t h = 0; h < args.n_heads; ++h) {
      double total = 0;  // a sum of any length
      for (int64_t b = 0; b < args.batch; ++b) {
        total += args.dsink_partial[b * args.n_heads + h];
      }
      sums[h] = static_cast<float>(total);
    }
  }
  return {dq, dk, dv, dbias, dsink};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("attention_infer.native", TORCH_BOX(&attention_infer));
  m.impl("attention_fwd.native", TORCH_BOX(&attention_fwd));
  m.impl("attention_fwd_native", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd.native", TORCH_BOX(&attention_bwd));
}
