#pragma once
// Converts the tensors of the decode ops to DecodeArgs, for the wrappers of both devices.
#include "head_tensors.h"

namespace fastattn {

// The arguments of attention_decode_fwd besides q and the caches, in the order of the schema.
struct DecodeInputs {
  Tensor cache_seqlens;
  OptionalTensor block_table, cache_batch_idx, cache_leftpad, alibi_slopes, sink;
  int64_t seqlen_new, window_left, window_right;
  double softcap, scale;
  int64_t num_splits;
};

// The arguments that describe a cache; both decode ops have them. A call owns the tensors that its args point to. The
// values of lengths and pages are not checked here, because they may be on a GPU.
template <typename Args>
struct CacheCall {
  OptionalTensor cache_seqlens, block_table, cache_batch_idx;
  Args args{};

  // rows: q, or the keys to append
  CacheCall(const Tensor& rows, const Tensor& k_cache, const Tensor& v_cache, const Tensor& lengths,
            const OptionalTensor& table, const OptionalTensor& batch_idx)
      : cache_seqlens(contiguous(OptionalTensor(lengths))),
        block_table(contiguous(table)),
        cache_batch_idx(contiguous(batch_idx)) {
    STD_TORCH_CHECK(rows.dim() == 4 && k_cache.dim() == 4 && v_cache.dim() == 4,
                    "attention_decode: tensors must have 4 dimensions, got ", rows.dim(), ", ", k_cache.dim(), " and ",
                    v_cache.dim());
    STD_TORCH_CHECK(k_cache.size(0) == v_cache.size(0) && k_cache.size(1) == v_cache.size(1) &&
                        k_cache.size(2) == v_cache.size(2) && k_cache.size(3) == rows.size(3) &&
                        k_cache.scalar_type() == rows.scalar_type() && v_cache.scalar_type() == rows.scalar_type(),
                    "attention_decode: the shapes of the caches do not match each other or the other tensors");
    STD_TORCH_CHECK(!block_table || block_table->dim() == 2, "attention_decode: block_table must have 2 dimensions");
    args.dtype = dtype_of(rows, "attention_decode: tensors");
    args.batch = rows.size(0);
    args.n_kv_heads = k_cache.size(1);
    args.head_dim = rows.size(3);
    args.head_dim_v = v_cache.size(3);
    args.page_size = std::max<int64_t>(1, k_cache.size(2));
    args.pages = block_table ? block_table->size(1) : 1;
    args.cache_seqlens = vector_data<int32_t>(cache_seqlens, ScalarType::Int, args.batch, "cache_seqlens");
    args.block_table = vector_data<int32_t>(block_table, ScalarType::Int, args.batch * args.pages, "block_table");
    args.cache_batch_idx = vector_data<int32_t>(cache_batch_idx, ScalarType::Int, args.batch, "cache_batch_idx");
    args.k = heads(k_cache);
    args.v = heads(v_cache);
  }

  void check_appended(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache) const {
    STD_TORCH_CHECK(v.dim() == 4 && k.size(0) == v.size(0) && k.size(1) == v.size(1) && k.size(2) == v.size(2) &&
                        k.size(1) == k_cache.size(1) && v.size(3) == v_cache.size(3) &&
                        v.scalar_type() == k.scalar_type(),
                    "attention_decode: the shapes of k and v do not match each other or the caches");
  }
};

// read: returns the tensor that the kernels of a device read, q itself or a copy
template <typename Args, Tensor (*read)(const Tensor&)>
struct DecodeCall : CacheCall<Args> {
  Tensor q, out, lse;
  OptionalTensor cache_leftpad, alibi_slopes, sink;

  DecodeCall(const Tensor& q_in, const Tensor& k_cache, const Tensor& v_cache, const DecodeInputs& in)
      : CacheCall<Args>(q_in, k_cache, v_cache, in.cache_seqlens, in.block_table, in.cache_batch_idx),
        q(read(q_in)),
        out(empty_in_layout(q_in, v_cache.size(3))),
        lse(empty_beside(q_in, {q_in.size(0), q_in.size(1), q_in.size(2)}, ScalarType::Float)),
        cache_leftpad(contiguous(in.cache_leftpad)),
        alibi_slopes(contiguous(in.alibi_slopes)),
        sink(contiguous(in.sink)) {
    Args& args = this->args;
    args.n_heads = q.size(1);
    args.seqlen_q = q.size(2);
    STD_TORCH_CHECK(args.n_heads == args.n_kv_heads || (args.n_kv_heads && args.n_heads % args.n_kv_heads == 0),
                    "attention_decode: the heads of q must be a multiple of those of the caches, got ", args.n_heads,
                    " and ", args.n_kv_heads);
    args.cache_leftpad = vector_data<int32_t>(cache_leftpad, ScalarType::Int, args.batch, "cache_leftpad");
    args.sink = vector_data<float>(sink, ScalarType::Float, args.n_heads, "sink");
    set_alibi(args, alibi_slopes);
    constexpr int64_t kFar = int64_t{1} << 40;  // in effect unlimited, but sums with it do not overflow
    args.seqlen_new = in.seqlen_new;
    args.window_left = std::min(in.window_left, kFar);
    args.window_right = std::min(in.window_right, kFar);
    args.softcap = static_cast<float>(in.softcap);
    args.scale = static_cast<float>(in.scale);
    args.q = heads(q);
    args.out = heads(out);
    args.lse = static_cast<float*>(lse.mutable_data_ptr());
  }

  int64_t rows() const { return this->args.batch * this->args.n_heads * this->args.seqlen_q; }
};

// The function for TORCH_BOX. It has the arguments of the schema and passes them to `run` as values.
template <auto run>
std::tuple<Tensor, Tensor> attention_decode_fwd_op(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                                   const Tensor& cache_seqlens, OptionalTensor block_table,
                                                   OptionalTensor cache_batch_idx, OptionalTensor cache_leftpad,
                                                   OptionalTensor alibi_slopes, OptionalTensor sink, int64_t seqlen_new,
                                                   int64_t window_left, int64_t window_right, double softcap,
                                                   double scale, int64_t num_splits) {
  return run(q, k_cache, v_cache,
             {cache_seqlens, block_table, cache_batch_idx, cache_leftpad, alibi_slopes, sink, seqlen_new, window_left,
              window_right, softcap, scale, num_splits});
}

}  // namespace fastattn
