// fastattn::attention_fwd and attention_bwd for CUDA tensors, on Hopper. Other devices and features: kernels/.
#include "host.h"  // before every other header: it switches on what they declare for CUDA

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "attention_tensors.h"
#include "mappable.h"

#ifdef FASTATTN_HAS_SM90
namespace {

using fastattn::AttentionCudaArgs;
using fastattn::dtype_of;
using fastattn::empty_beside;
using fastattn::empty_in_layout;
using fastattn::heads;
using fastattn::mappable;
using fastattn::vector_data;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The arguments of a call, and what must live as long as it runs.
struct Call {
  Tensor q, k, v;
  OptionalTensor seqlens_k, cu_seqlens_q, cu_seqlens_k;
  AttentionCudaArgs args{};

  Call(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const OptionalTensor& seqlens,
       const OptionalTensor& cu_q, const OptionalTensor& cu_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
       int64_t window_left, int64_t window_right, bool top_left, double scale)
      : q((fastattn::check_qkv(q_in, k_in, v_in), mappable(q_in))),
        k(mappable(k_in)),
        v(mappable(v_in)),
        seqlens_k(fastattn::contiguous(seqlens)),
        cu_seqlens_q(fastattn::contiguous(cu_q)),
        cu_seqlens_k(fastattn::contiguous(cu_k)) {
    const bool packed = cu_seqlens_q.has_value();
    args.dtype = dtype_of(q, "q");
    args.batch = packed ? cu_seqlens_q->numel() - 1 : q.size(0);
    args.n_heads = q.size(1);
    args.n_kv_heads = k.size(1);
    args.rows_q = q.size(2);
    args.rows_k = k.size(2);
    args.seqlen_q = packed ? std::min(max_seqlen_q, args.rows_q) : args.rows_q;
    args.seqlen_k = packed ? std::min(max_seqlen_k, args.rows_k) : args.rows_k;
    args.head_dim = args.head_dim_v = q.size(3);
    args.lse_head = args.rows_q;
    args.lse_batch = packed ? 0 : args.n_heads * args.rows_q;
    fastattn::check_tiles("attention", args.dtype, args.head_dim, v.size(3));
    STD_TORCH_CHECK(!packed || q.size(0) == 1, "attention: packed sequences have batch 1, got ", q.size(0));
    constexpr int64_t kLongest = int64_t{1} << 29, kMostHeads = int64_t{1} << 31;
    STD_TORCH_CHECK(args.rows_q < kLongest && args.rows_k < kLongest && args.batch * args.n_heads < kMostHeads,
                    "attention: the CUDA kernel takes fewer than ", kLongest, " positions and ", kMostHeads,
                    " heads of all sequences, got ", args.rows_q, ", ", args.rows_k, " and ",
                    args.batch * args.n_heads);
    for (const OptionalTensor* t : {&seqlens_k, &cu_seqlens_q, &cu_seqlens_k}) {
      fastattn::check_device(*t, q, "seqlens");
    }
    args.seqlens_k = vector_data<int32_t>(seqlens_k, ScalarType::Int, args.batch, "seqlens_k");
    args.cu_seqlens_q = vector_data<int32_t>(cu_seqlens_q, ScalarType::Int, args.batch + 1, "cu_seqlens_q");
    args.cu_seqlens_k = vector_data<int32_t>(cu_seqlens_k, ScalarType::Int, args.batch + 1, "cu_seqlens_k");
    args.window_left = window_left;
    args.window_right = window_right;
    args.top_left = top_left;
    args.scale = static_cast<float>(scale);
    args.q = heads(q, packed);
    args.k = heads(k, packed);
    args.v = heads(v, packed);
  }

  bool empty() const { return q.numel() == 0 || k.numel() == 0 || args.batch == 0; }
};

void refuse(const OptionalTensor& bias, const OptionalTensor& sink, const OptionalTensor& mask,
            const OptionalTensor& alibi_slopes, double softcap, double dropout_p) {
  STD_TORCH_CHECK(!bias && !sink && !mask && !alibi_slopes && softcap == 0 && dropout_p == 0,
                  "attention: the CUDA kernel takes no bias, sink, mask, ALiBi slopes, softcap or dropout");
}

std::tuple<Tensor, Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor bias,
                                                 OptionalTensor sink, OptionalTensor mask, OptionalTensor seqlens_k,
                                                 OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
                                                 OptionalTensor alibi_slopes, OptionalTensor, int64_t max_seqlen_q,
                                                 int64_t max_seqlen_k, int64_t window_left, int64_t window_right,
                                                 bool top_left, double softcap, double dropout_p, double scale,
                                                 bool need_low) {
  const fastattn::DeviceGuard guard(q.get_device_index());
  refuse(bias, sink, mask, alibi_slopes, softcap, dropout_p);
  Call call(q, k, v, seqlens_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_left, window_right,
            top_left, scale);
  STD_TORCH_CHECK(
      !need_low,
      "attention: the CUDA kernel makes no lse_low, which half precision without a bias or ALiBi does not need");
  Tensor out = empty_in_layout(q, v.size(3));
  Tensor lse = empty_beside(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  const Tensor no_low = empty_beside(q, {0}, ScalarType::Float);
  if (call.empty()) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -INFINITY);
    return {out, lse, no_low};
  }
  call.args.out = heads(out, call.args.cu_seqlens_q != nullptr);
  call.args.lse = static_cast<float*>(lse.mutable_data_ptr());
  const Tensor counter = empty_beside(q, {1}, ScalarType::Int);
  call.args.tile_counters = static_cast<uint32_t*>(counter.mutable_data_ptr());
  fastattn::check_launch(fastattn::attention_fwd_sm90(call.args, fastattn::current_stream(q)), "attention_fwd");
  return {out, lse, no_low};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_bwd(
    OptionalTensor dout_in, OptionalTensor dlse_in, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out_in, const Tensor& lse_in, const Tensor&, OptionalTensor bias, OptionalTensor sink,
    OptionalTensor mask, OptionalTensor seqlens_k, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
    OptionalTensor alibi_slopes, OptionalTensor, int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t window_left,
    int64_t window_right, bool top_left, double softcap, double dropout_p, double scale, bool need_dbias,
    bool deterministic) {
  const fastattn::DeviceGuard guard(q.get_device_index());
  refuse(bias, sink, mask, alibi_slopes, softcap, dropout_p);
  STD_TORCH_CHECK(!need_dbias, "attention: there is no bias to have a gradient");
  Call call(q, k, v, seqlens_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_left, window_right,
            top_left, scale);
  AttentionCudaArgs& args = call.args;
  STD_TORCH_CHECK(args.head_dim <= 128, "attention: the CUDA backward takes head dims up to 128, got ", args.head_dim);
  const bool packed = args.cu_seqlens_q != nullptr;
  Tensor dq = empty_in_layout(q, q.size(3)), dk = empty_in_layout(k, k.size(3)), dv = empty_in_layout(v, v.size(3));
  const Tensor nothing = empty_beside(q, {0}, q.scalar_type()), no_dsink = empty_beside(q, {0}, ScalarType::Float);
  if (call.empty()) {
    for (Tensor* t : {&dq, &dk, &dv}) {
      torch::stable::zero_(*t);
    }
    return {dq, dk, dv, nothing, no_dsink};
  }
  const Tensor out = mappable(out_in), dout = dout_in ? mappable(*dout_in) : torch::stable::new_zeros(out, out.sizes()),
               lse = torch::stable::contiguous(lse_in);
  const OptionalTensor dlse = fastattn::contiguous(dlse_in);
  STD_TORCH_CHECK(out.dim() == 4 && out.numel() == q.numel() && dout.numel() == q.numel() &&
                      lse.numel() == q.size(0) * q.size(1) * q.size(2) && (!dlse || dlse->numel() == lse.numel()),
                  "attention: do, dlse, out and lse do not fit q and v");
  STD_TORCH_CHECK(dout.scalar_type() == q.scalar_type() && out.scalar_type() == q.scalar_type() &&
                      lse.scalar_type() == ScalarType::Float && (!dlse || dlse->scalar_type() == ScalarType::Float),
                  "attention: do and out must have the dtype of q, lse and dlse float32");
  args.stats_head = fastattn::attention_stats_rows_sm90(args);
  args.stats_batch = packed ? 0 : args.n_heads * args.stats_head;
  const Tensor stats = empty_beside(q, {2, q.size(0), args.n_heads, args.stats_head}, ScalarType::Float);
  args.lse2 = static_cast<float*>(stats.mutable_data_ptr());
  args.delta = args.lse2 + stats.numel() / 2;
  const Tensor dq_sums = empty_beside(q, {deterministic ? 0 : stats.numel() / 2, args.head_dim}, ScalarType::Float);
  args.dq_sums = deterministic ? nullptr : static_cast<float*>(dq_sums.mutable_data_ptr());
  const Tensor counters = empty_beside(q, {2}, ScalarType::Int);
  args.tile_counters = static_cast<uint32_t*>(counters.mutable_data_ptr());
  args.out = heads(out, packed);
  args.dout = heads(dout, packed);
  args.dq = heads(dq, packed);
  args.dk = heads(dk, packed);
  args.dv = heads(dv, packed);
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  args.dlse = dlse ? static_cast<const float*>(dlse->const_data_ptr()) : nullptr;
  void* stream = fastattn::current_stream(q);
  fastattn::check_launch(fastattn::attention_stats_sm90(args, stream), "attention_bwd");
  fastattn::check_launch(fastattn::attention_dkdv_sm90(args, stream), "attention_bwd");
  const auto finish = deterministic ? fastattn::attention_dq_sm90 : fastattn::attention_round_sm90;
  fastattn::check_launch(finish(args, stream), "attention_bwd");
  return {dq, dk, dv, nothing, no_dsink};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("attention_fwd.native", TORCH_BOX(&attention_fwd));
  m.impl("attention_fwd_native", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd.native", TORCH_BOX(&attention_bwd));
}
#endif
