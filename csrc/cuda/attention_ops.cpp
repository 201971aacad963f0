// fastattn::attention_fwd and attention_bwd for CUDA tensors on Hopper. Triton serves all other devices and features
// (kernels/).
#include "host.h"  // must be first: it enables the CUDA declarations of the other headers

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "attention_call.h"
#include "mappable.h"

#ifdef FASTATTN_HAS_SM90
namespace {

using fastattn::AttentionCudaArgs;
using fastattn::AttentionInputs;
using fastattn::AttentionOutputs;
using fastattn::empty_beside;
using fastattn::empty_in_layout;
using fastattn::OptionalTensor;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Call = fastattn::AttentionCall<AttentionCudaArgs, fastattn::mappable>;
using BackwardCall = fastattn::AttentionBackwardCall<AttentionCudaArgs, fastattn::mappable>;

void refuse_features(const AttentionInputs& in) {
  STD_TORCH_CHECK(!in.bias && !in.sink && !in.mask && !in.alibi_slopes && in.softcap == 0 && in.dropout_p == 0,
                  "attention: the CUDA kernel takes no bias, sink, mask, ALiBi slopes, softcap or dropout");
}

// Checks the sizes that the kernels support and sets the fields of AttentionCudaArgs.
void set_rows(Call& call) {
  AttentionCudaArgs& args = call.args;
  fastattn::check_tiles("attention", args.dtype, args.head_dim, args.head_dim_v);
  args.rows_q = call.q.size(2);
  args.rows_k = call.k.size(2);
  constexpr int64_t kLongest = int64_t{1} << 29, kMostHeads = int64_t{1} << 31;
  STD_TORCH_CHECK(args.rows_q < kLongest && args.rows_k < kLongest && args.batch * args.n_heads < kMostHeads,
                  "attention: the CUDA kernel takes fewer than ", kLongest, " positions and ", kMostHeads,
                  " heads of all sequences, got ", args.rows_q, ", ", args.rows_k, " and ", args.batch * args.n_heads);
  for (const OptionalTensor* t : {&call.in.seqlens_k, &call.in.cu_seqlens_q, &call.in.cu_seqlens_k}) {
    fastattn::check_device(*t, call.q, "seqlens");
  }
}

std::tuple<Tensor, Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                                 AttentionInputs inputs, bool need_low) {
  const fastattn::DeviceGuard guard(q.get_device_index());
  refuse_features(inputs);
  Call call(q, k, v, std::move(inputs));
  set_rows(call);
  STD_TORCH_CHECK(!need_low,
                  "attention: the CUDA kernel does not compute lse_low, which half precision without a bias or ALiBi "
                  "does not need");
  Tensor out = empty_in_layout(q, v.size(3));
  Tensor lse = empty_beside(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  const Tensor no_low = empty_beside(q, {0}, ScalarType::Float);
  if (call.empty()) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -INFINITY);
    return {out, lse, no_low};
  }
  call.args.out = fastattn::heads(out, call.packed);
  call.args.lse = static_cast<float*>(lse.mutable_data_ptr());
  const Tensor counter = empty_beside(q, {1}, ScalarType::Int);
  call.args.tile_counters = static_cast<uint32_t*>(counter.mutable_data_ptr());
  fastattn::check_launch(fastattn::attention_fwd_sm90(call.args, fastattn::current_stream(q)), "attention_fwd");
  return {out, lse, no_low};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_bwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                                                 const AttentionOutputs& outputs,
                                                                 AttentionInputs inputs, bool need_dbias,
                                                                 bool deterministic) {
  const fastattn::DeviceGuard guard(q.get_device_index());
  refuse_features(inputs);
  STD_TORCH_CHECK(!need_dbias, "attention: need_dbias requires a bias");
  BackwardCall call(q, k, v, outputs, std::move(inputs));
  set_rows(call);
  AttentionCudaArgs& args = call.args;
  STD_TORCH_CHECK(args.head_dim <= 128, "attention: the CUDA backward supports head dims up to 128, got ",
                  args.head_dim);
  const Tensor no_dbias = empty_beside(q, {0}, q.scalar_type()), no_dsink = empty_beside(q, {0}, ScalarType::Float);
  if (call.empty()) {
    for (Tensor* t : {&call.dq, &call.dk, &call.dv}) {
      torch::stable::zero_(*t);
    }
    return {call.dq, call.dk, call.dv, no_dbias, no_dsink};
  }
  args.stats_head = fastattn::attention_stats_rows_sm90(args);
  args.stats_batch = call.packed ? 0 : args.n_heads * args.stats_head;
  const Tensor stats = empty_beside(q, {2, q.size(0), args.n_heads, args.stats_head}, ScalarType::Float);
  args.lse2 = static_cast<float*>(stats.mutable_data_ptr());
  args.delta = args.lse2 + stats.numel() / 2;
  const Tensor dq_sums = empty_beside(q, {deterministic ? 0 : stats.numel() / 2, args.head_dim}, ScalarType::Float);
  args.dq_sums = deterministic ? nullptr : static_cast<float*>(dq_sums.mutable_data_ptr());
  const Tensor counters = empty_beside(q, {2}, ScalarType::Int);
  args.tile_counters = static_cast<uint32_t*>(counters.mutable_data_ptr());
  void* stream = fastattn::current_stream(q);
  fastattn::check_launch(fastattn::attention_stats_sm90(args, stream), "attention_bwd");
  fastattn::check_launch(fastattn::attention_dkdv_sm90(args, stream), "attention_bwd");
  const auto finish = deterministic ? fastattn::attention_dq_sm90 : fastattn::attention_round_sm90;
  fastattn::check_launch(finish(args, stream), "attention_bwd");
  return {call.dq, call.dk, call.dv, no_dbias, no_dsink};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("attention_fwd.native", TORCH_BOX(&fastattn::attention_fwd_op<attention_fwd>));
  m.impl("attention_fwd_native", TORCH_BOX(&fastattn::attention_fwd_op<attention_fwd>));
  m.impl("attention_bwd.native", TORCH_BOX(&fastattn::attention_bwd_op<attention_bwd>));
}
#endif
