// fastattn::attention_decode_fwd and attention_decode_append for CUDA tensors, on Hopper. Other devices and features:
// kernels/.
#include "host.h"  // before every other header: it switches on what they declare for CUDA

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "attention_tensors.h"
#include "mappable.h"

#ifdef FASTATTN_HAS_SM90
namespace {

using fastattn::DecodeCudaArgs;
using fastattn::dtype_of;
using fastattn::empty_beside;
using fastattn::empty_in_layout;
using fastattn::heads;
using fastattn::mappable;
using fastattn::vector_data;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What both ops say of a cache, and what must live as long as they run. Lengths and pages are the device's: what they
// name is not looked at here.
struct Cache {
  OptionalTensor cache_seqlens, block_table, cache_batch_idx;
  DecodeCudaArgs args{};

  Cache(const Tensor& rows, const Tensor& k_cache, const Tensor& v_cache, const Tensor& lengths,
        const OptionalTensor& table, const OptionalTensor& batch_idx)
      : cache_seqlens(fastattn::contiguous(OptionalTensor(lengths))),
        block_table(fastattn::contiguous(table)),
        cache_batch_idx(fastattn::contiguous(batch_idx)) {
    STD_TORCH_CHECK(rows.dim() == 4 && k_cache.dim() == 4 && v_cache.dim() == 4,
                    "attention_decode: tensors must have 4 dimensions, got ", rows.dim(), ", ", k_cache.dim(), " and ",
                    v_cache.dim());
    STD_TORCH_CHECK(k_cache.size(0) == v_cache.size(0) && k_cache.size(1) == v_cache.size(1) &&
                        k_cache.size(2) == v_cache.size(2) && k_cache.size(3) == rows.size(3) &&
                        k_cache.scalar_type() == rows.scalar_type() && v_cache.scalar_type() == rows.scalar_type(),
                    "attention_decode: the caches do not fit each other or the other tensors");
    args.dtype = dtype_of(rows, "attention_decode: tensors");
    args.batch = rows.size(0);
    args.n_kv_heads = k_cache.size(1);
    args.head_dim = args.head_dim_v = rows.size(3);
    fastattn::check_tiles("attention_decode", args.dtype, args.head_dim, v_cache.size(3));
    STD_TORCH_CHECK(fastattn::is_mappable(k_cache) && fastattn::is_mappable(v_cache),
                    "attention_decode: the CUDA kernel takes caches that begin at a multiple of 16 bytes, with strides"
                    " that are multiples of 8 elements and last stride 1, got strides ",
                    k_cache.stride(0), ", ", k_cache.stride(1), ", ", k_cache.stride(2), ", ", k_cache.stride(3),
                    " of k_cache");
    args.cache_rows = k_cache.size(0);
    args.page_size = k_cache.size(2);
    STD_TORCH_CHECK(!block_table || (block_table->dim() == 2 && args.page_size % fastattn::kDecodeKeysSm90 == 0),
                    "attention_decode: the CUDA kernel takes pages of a multiple of ", fastattn::kDecodeKeysSm90,
                    " keys, got ", args.page_size);
    args.pages = block_table ? block_table->size(1) : 1;
    constexpr int64_t kLongest = int64_t{1} << 29;
    STD_TORCH_CHECK(args.page_size * args.pages < kLongest, "attention_decode: the CUDA kernel takes fewer than ",
                    kLongest, " keys, got room for ", args.page_size * args.pages);
    STD_TORCH_CHECK(block_table || cache_batch_idx || args.cache_rows == args.batch,
                    "attention_decode: the caches must have the batch of the other tensors, ", args.batch, ", got ",
                    args.cache_rows);
    for (const OptionalTensor* t : {&cache_seqlens, &block_table, &cache_batch_idx}) {
      fastattn::check_device(*t, rows, "lengths and pages");
    }
    args.cache_seqlens = vector_data<int32_t>(cache_seqlens, ScalarType::Int, args.batch, "cache_seqlens");
    args.block_table = vector_data<int32_t>(block_table, ScalarType::Int, args.batch * args.pages, "block_table");
    args.cache_batch_idx = vector_data<int32_t>(cache_batch_idx, ScalarType::Int, args.batch, "cache_batch_idx");
    args.k = heads(k_cache);
    args.v = heads(v_cache);
  }
};

std::tuple<Tensor, Tensor> attention_decode_fwd(const Tensor& q_in, const Tensor& k_cache, const Tensor& v_cache,
                                                const Tensor& cache_seqlens, OptionalTensor block_table,
                                                OptionalTensor cache_batch_idx, OptionalTensor cache_leftpad,
                                                OptionalTensor alibi_slopes, OptionalTensor sink, int64_t seqlen_new,
                                                int64_t window_left, int64_t window_right, double softcap, double scale,
                                                int64_t num_splits) {
  const fastattn::DeviceGuard guard(q_in.get_device_index());
  STD_TORCH_CHECK(!cache_leftpad && !alibi_slopes && !sink && softcap == 0,
                  "attention_decode: the CUDA kernel takes no cache_leftpad, ALiBi slopes, softcap or sink");
  Cache cache(q_in, k_cache, v_cache, cache_seqlens, block_table, cache_batch_idx);
  DecodeCudaArgs& args = cache.args;
  args.n_heads = q_in.size(1);
  args.seqlen_q = q_in.size(2);
  args.seqlen_new = seqlen_new;
  args.window_left = window_left;
  args.window_right = window_right;
  args.scale = static_cast<float>(scale);
  STD_TORCH_CHECK(args.n_heads == args.n_kv_heads || (args.n_kv_heads && args.n_heads % args.n_kv_heads == 0),
                  "attention_decode: the heads of q must be a multiple of those of the caches, got ", args.n_heads,
                  " and ", args.n_kv_heads);
  Tensor out = empty_in_layout(q_in, args.head_dim);
  Tensor lse = empty_beside(q_in, {args.batch, args.n_heads, args.seqlen_q}, ScalarType::Float);
  const int64_t rows = args.batch * args.n_heads * args.seqlen_q;
  constexpr int64_t kMostRows = int64_t{1} << 31;
  STD_TORCH_CHECK(rows < kMostRows, "attention_decode: the CUDA kernel takes fewer than ", kMostRows,
                  " queries of all heads, got ", rows);
  if (rows == 0 || k_cache.numel() == 0 || args.pages == 0) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -INFINITY);
    return {out, lse};
  }
  const Tensor q = mappable(q_in);
  args.q = heads(q);
  args.out = heads(out);
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  args.splits = fastattn::attention_decode_splits_sm90(args, num_splits);
  OptionalTensor partial;
  if (args.splits > 1) {  // sums before maxima: their rows are read 16 bytes at a time
    partial = empty_beside(q, {args.splits * rows * (args.head_dim + 2)}, ScalarType::Float);
    args.partial = static_cast<float*>(partial->mutable_data_ptr());
    args.partial_max = args.partial + args.splits * rows * args.head_dim;
    args.partial_sum = args.partial_max + args.splits * rows;
  }
  fastattn::check_launch(fastattn::attention_decode_fwd_sm90(args, fastattn::current_stream(q)),
                         "attention_decode_fwd");
  return {out, lse};
}

void attention_decode_append(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k_in, const Tensor& v_in,
                             const Tensor& cache_seqlens, OptionalTensor block_table, OptionalTensor cache_batch_idx) {
  const fastattn::DeviceGuard guard(k_cache.get_device_index());
  Cache cache(k_in, k_cache, v_cache, cache_seqlens, block_table, cache_batch_idx);
  STD_TORCH_CHECK(v_in.dim() == 4 && v_in.scalar_type() == k_in.scalar_type() && k_in.size(1) == k_cache.size(1) &&
                      v_in.numel() == k_in.numel() && v_in.size(2) == k_in.size(2),
                  "attention_decode: k and v do not fit each other or the caches");
  if (k_in.numel() == 0 || k_cache.numel() == 0) {
    return;
  }
  const Tensor k = mappable(k_in), v = mappable(v_in);
  DecodeCudaArgs& args = cache.args;
  args.k_new = heads(k);
  args.v_new = heads(v);
  args.seqlen_new = k.size(2);
  fastattn::check_launch(fastattn::attention_decode_append_sm90(args, fastattn::current_stream(k)),
                         "attention_decode_append");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("attention_decode_fwd.native", TORCH_BOX(&attention_decode_fwd));
  m.impl("attention_decode_fwd_native", TORCH_BOX(&attention_decode_fwd));
  m.impl("attention_decode_append.native", TORCH_BOX(&attention_decode_append));
  m.impl("attention_decode_append_native", TORCH_BOX(&attention_decode_append));
}
#endif
