#pragma once
// Converts the tensors of the attention ops to AttentionArgs, for the wrappers of both devices.
#include "head_tensors.h"

namespace fastattn {

// The arguments of a call besides q, k and v, in the order of the schema.
struct AttentionInputs {
  OptionalTensor bias, sink, mask, seqlens_k, cu_seqlens_q, cu_seqlens_k, alibi_slopes, rng;
  int64_t max_seqlen_q, max_seqlen_k, window_left, window_right;
  bool top_left;
  double softcap, dropout_p, scale;
};

// The results of the forward that the backward reads, and their gradients.
struct AttentionOutputs {
  OptionalTensor dout, dlse;
  Tensor out, lse, lse_low;
};

// Checks that the sizes match. The public function reports such mistakes in more detail.
inline void check_qkv(const Tensor& q, const Tensor& k, const Tensor& v) {
  for (const Tensor* t : {&q, &k, &v}) {
    STD_TORCH_CHECK(t->dim() == 4, "attention: q, k and v must have 4 dimensions, got ", t->dim());
    STD_TORCH_CHECK(t->scalar_type() == q.scalar_type(), "attention: q, k and v must have the same dtype");
  }
  STD_TORCH_CHECK(k.size(0) == q.size(0) && v.size(0) == q.size(0) && v.size(1) == k.size(1) &&
                      v.size(2) == k.size(2) && k.size(3) == q.size(3),
                  "attention: the shapes of q, k and v do not match");
  STD_TORCH_CHECK(q.size(1) == k.size(1) || (k.size(1) && q.size(1) % k.size(1) == 0),
                  "attention: the heads of q must be a multiple of those of k, got ", q.size(1), " and ", k.size(1));
}

// Sets the stride of dimensions of size 1 to 0.
inline ScoreTensor score_tensor(const Tensor& t) {
  const auto stride = [&](int64_t d) { return t.size(d) == 1 ? 0 : t.stride(d); };
  return {data_of(t), stride(0), stride(1), stride(2), stride(3)};
}

// A mask or bias that broadcasts to (batch, heads, seqlen_q, seqlen_k).
inline ScoreTensor checked_scores(const Tensor& t, const std::array<int64_t, 4>& full, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, name, " must have 4 dimensions, got ", t.dim());
  for (int d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(t.size(d) == full[d] || t.size(d) == 1, name, " must have size 1 or ", full[d], " in dimension ", d,
                    ", got ", t.size(d));
  }
  return score_tensor(t);
}

// Owns the tensors that its args point to. `read` returns the tensor that the kernels of a device read: the tensor
// itself or a copy. Args is AttentionArgs, or the struct that a device derives from it.
template <typename Args, Tensor (*read)(const Tensor&)>
struct AttentionCall {
  Tensor q, k, v;
  AttentionInputs in;
  bool packed;
  Args args{};

  AttentionCall(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, AttentionInputs inputs)
      : q((check_qkv(q_in, k_in, v_in), read(q_in))),
        k(read(k_in)),
        v(read(v_in)),
        in(std::move(inputs)),
        packed(in.cu_seqlens_q.has_value()) {
    for (OptionalTensor* t : {&in.sink, &in.seqlens_k, &in.cu_seqlens_q, &in.cu_seqlens_k, &in.alibi_slopes, &in.rng}) {
      *t = contiguous(*t);
    }
    set_sizes();
    set_scores();
    constexpr int64_t kFar = int64_t{1} << 40;  // in effect unlimited, but sums with it do not overflow
    args.window_left = std::min(in.window_left, kFar);
    args.window_right = std::min(in.window_right, kFar);
    args.top_left = in.top_left;
    args.softcap = static_cast<float>(in.softcap);
    args.scale = static_cast<float>(in.scale);
    args.dropout = dropout_args(in.rng, in.dropout_p);
    args.q = heads(q, packed);
    args.k = heads(k, packed);
    args.v = heads(v, packed);
  }

  // True if there is nothing to compute.
  bool empty() const { return q.numel() == 0 || k.numel() == 0 || args.batch == 0; }

 private:
  void set_sizes() {
    STD_TORCH_CHECK(!packed || (q.size(0) == 1 && !in.mask && !in.bias),
                    "attention: packed sequences have batch 1, no mask or bias");
    args.dtype = dtype_of(q, "q");
    args.batch = packed ? in.cu_seqlens_q->numel() - 1 : q.size(0);
    args.n_heads = q.size(1);
    args.n_kv_heads = k.size(1);
    args.seqlen_q = packed ? std::min(in.max_seqlen_q, q.size(2)) : q.size(2);
    args.seqlen_k = packed ? std::min(in.max_seqlen_k, k.size(2)) : k.size(2);
    args.head_dim = q.size(3);
    args.head_dim_v = v.size(3);
    args.lse_head = q.size(2);
    args.lse_batch = packed ? 0 : args.n_heads * q.size(2);
    args.cu_seqlens_q = vector_data<int32_t>(in.cu_seqlens_q, ScalarType::Int, args.batch + 1, "cu_seqlens_q");
    args.cu_seqlens_k = vector_data<int32_t>(in.cu_seqlens_k, ScalarType::Int, args.batch + 1, "cu_seqlens_k");
    args.seqlens_k = vector_data<int32_t>(in.seqlens_k, ScalarType::Int, args.batch, "seqlens_k");
  }

  void set_scores() {
    const std::array<int64_t, 4> full{args.batch, args.n_heads, args.seqlen_q, args.seqlen_k};
    if (in.mask) {
      STD_TORCH_CHECK(in.mask->scalar_type() == ScalarType::Bool, "mask must be bool");
      args.mask = checked_scores(*in.mask, full, "mask");
    }
    if (in.bias) {
      args.bias_dtype = dtype_of(*in.bias, "bias");
      args.bias = checked_scores(*in.bias, full, "bias");
    }
    args.sink = vector_data<float>(in.sink, ScalarType::Float, args.n_heads, "sink");
    set_alibi(args, in.alibi_slopes);
  }
};

template <typename Args, Tensor (*read)(const Tensor&)>
struct AttentionBackwardCall : AttentionCall<Args, read> {
  Tensor out, dout, lse, lse_low;
  OptionalTensor dlse;
  Tensor dq, dk, dv;

  AttentionBackwardCall(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const AttentionOutputs& outputs,
                        AttentionInputs inputs)
      : AttentionCall<Args, read>(q_in, k_in, v_in, std::move(inputs)),
        out((check(outputs), read(outputs.out))),
        dout(outputs.dout ? read(*outputs.dout) : torch::stable::new_zeros(out, out.sizes())),
        lse(*contiguous(OptionalTensor(outputs.lse))),
        lse_low(*contiguous(OptionalTensor(outputs.lse_low))),
        dlse(contiguous(outputs.dlse)),
        dq(empty_in_layout(q_in, q_in.size(3))),
        dk(empty_in_layout(k_in, k_in.size(3))),
        dv(empty_in_layout(v_in, v_in.size(3))) {
    Args& args = this->args;
    args.out = heads(out, this->packed);
    args.dout = heads(dout, this->packed);
    args.dq = heads(dq, this->packed);
    args.dk = heads(dk, this->packed);
    args.dv = heads(dv, this->packed);
    args.lse = static_cast<float*>(lse.mutable_data_ptr());
    args.lse_low = lse_low.numel() ? static_cast<float*>(lse_low.mutable_data_ptr()) : nullptr;
    args.dlse = dlse ? static_cast<const float*>(data_of(*dlse)) : nullptr;
  }

 private:
  void check(const AttentionOutputs& saved) const {
    const Tensor& q = this->q;
    const int64_t rows = q.size(0) * q.size(1) * q.size(2), size = rows * this->v.size(3);
    const auto fits = [&](const Tensor& t) { return t.dim() == 4 && t.numel() == size; };
    STD_TORCH_CHECK(fits(saved.out) && (!saved.dout || fits(*saved.dout)) && saved.lse.numel() == rows &&
                        (saved.lse_low.numel() == 0 || saved.lse_low.numel() == rows) &&
                        (!saved.dlse || saved.dlse->numel() == rows),
                    "attention: the shapes of dout, dlse, out, lse and lse_low do not match q and v");
    const auto is = [](const OptionalTensor& t, ScalarType dtype) { return !t || t->scalar_type() == dtype; };
    STD_TORCH_CHECK(is(saved.dout, q.scalar_type()) && is(saved.out, q.scalar_type()) &&
                        is(saved.lse, ScalarType::Float) && is(saved.lse_low, ScalarType::Float) &&
                        is(saved.dlse, ScalarType::Float),
                    "attention: dout and out must have the dtype of q, lse, lse_low and dlse float32");
  }
};

// The functions for TORCH_BOX. They have the arguments of the schema and pass them to `run` as values.
template <auto run>
std::tuple<Tensor, Tensor, Tensor> attention_fwd_op(const Tensor& q, const Tensor& k, const Tensor& v,
                                                    OptionalTensor bias, OptionalTensor sink, OptionalTensor mask,
                                                    OptionalTensor seqlens_k, OptionalTensor cu_seqlens_q,
                                                    OptionalTensor cu_seqlens_k, OptionalTensor alibi_slopes,
                                                    OptionalTensor rng, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                                    int64_t window_left, int64_t window_right, bool top_left,
                                                    double softcap, double dropout_p, double scale, bool need_low) {
  return run(q, k, v,
             {bias, sink, mask, seqlens_k, cu_seqlens_q, cu_seqlens_k, alibi_slopes, rng, max_seqlen_q, max_seqlen_k,
              window_left, window_right, top_left, softcap, dropout_p, scale},
             need_low);
}

template <auto run>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_bwd_op(
    OptionalTensor dout, OptionalTensor dlse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const Tensor& lse_low, OptionalTensor bias, OptionalTensor sink, OptionalTensor mask,
    OptionalTensor seqlens_k, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, OptionalTensor alibi_slopes,
    OptionalTensor rng, int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t window_left, int64_t window_right,
    bool top_left, double softcap, double dropout_p, double scale, bool need_dbias, bool deterministic) {
  return run(q, k, v, {dout, dlse, out, lse, lse_low},
             {bias, sink, mask, seqlens_k, cu_seqlens_q, cu_seqlens_k, alibi_slopes, rng, max_seqlen_q, max_seqlen_k,
              window_left, window_right, top_left, softcap, dropout_p, scale},
             need_dbias, deterministic);
}

}  // namespace fastattn
