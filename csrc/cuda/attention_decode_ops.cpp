// fastattn::attention_decode_fwd and attention_decode_append for CUDA tensors on Hopper. Triton serves all other
// devices and features (kernels/).
#include "host.h"  // must be first: it enables the CUDA declarations of the other headers

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "attention_decode_call.h"
#include "mappable.h"

#ifdef FASTATTN_HAS_SM90
namespace {

using fastattn::DecodeCudaArgs;
using fastattn::mappable;
using fastattn::OptionalTensor;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using CacheCall = fastattn::CacheCall<DecodeCudaArgs>;
using Call = fastattn::DecodeCall<DecodeCudaArgs, mappable>;

// Checks the requirements on a cache. Lengths and pages are on the device, so their values are not checked here.
void check_cache(CacheCall& call, const Tensor& k_cache, const Tensor& v_cache) {
  DecodeCudaArgs& args = call.args;
  fastattn::check_tiles("attention_decode", args.dtype, args.head_dim, args.head_dim_v);
  STD_TORCH_CHECK(fastattn::is_mappable(k_cache) && fastattn::is_mappable(v_cache),
                  "attention_decode: the CUDA kernel takes caches that begin at a multiple of 16 bytes, with strides"
                  " that are multiples of 8 elements and last stride 1, got strides ",
                  k_cache.stride(0), ", ", k_cache.stride(1), ", ", k_cache.stride(2), ", ", k_cache.stride(3),
                  " of k_cache");
  args.cache_rows = k_cache.size(0);
  STD_TORCH_CHECK(!args.block_table || k_cache.size(2) % fastattn::kDecodeKeysSm90 == 0,
                  "attention_decode: the CUDA kernel takes pages of a multiple of ", fastattn::kDecodeKeysSm90,
                  " keys, got ", args.page_size);
  constexpr int64_t kLongest = int64_t{1} << 29;
  STD_TORCH_CHECK(args.page_size * args.pages < kLongest, "attention_decode: the CUDA kernel takes fewer than ",
                  kLongest, " keys, got room for ", args.page_size * args.pages);
  STD_TORCH_CHECK(args.block_table || args.cache_batch_idx || args.cache_rows == args.batch,
                  "attention_decode: the caches must have the batch of the other tensors, ", args.batch, ", got ",
                  args.cache_rows);
  for (const OptionalTensor* t : {&call.cache_seqlens, &call.block_table, &call.cache_batch_idx}) {
    fastattn::check_device(*t, k_cache, "lengths and pages");
  }
}

std::tuple<Tensor, Tensor> attention_decode_fwd(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                                const fastattn::DecodeInputs& in) {
  const fastattn::DeviceGuard guard(q.get_device_index());
  STD_TORCH_CHECK(!in.cache_leftpad && !in.alibi_slopes && !in.sink && in.softcap == 0,
                  "attention_decode: the CUDA kernel takes no cache_leftpad, ALiBi slopes, softcap or sink");
  Call call(q, k_cache, v_cache, in);
  check_cache(call, k_cache, v_cache);
  DecodeCudaArgs& args = call.args;
  const int64_t rows = call.rows();
  constexpr int64_t kMostRows = int64_t{1} << 31;
  STD_TORCH_CHECK(rows < kMostRows, "attention_decode: the CUDA kernel takes fewer than ", kMostRows,
                  " queries of all heads, got ", rows);
  if (rows == 0 || k_cache.numel() == 0 || args.pages == 0) {
    torch::stable::zero_(call.out);
    torch::stable::fill_(call.lse, -INFINITY);
    return {call.out, call.lse};
  }
  args.splits = fastattn::attention_decode_splits_sm90(args, in.num_splits);
  OptionalTensor partial;
  // The sums come first, because their rows are read 16 bytes at a time.
  if (args.splits > 1) {
    partial = fastattn::empty_beside(q, {args.splits * rows * (args.head_dim + 2)}, ScalarType::Float);
    args.partial = static_cast<float*>(partial->mutable_data_ptr());
    args.partial_max = args.partial + args.splits * rows * args.head_dim;
    args.partial_sum = args.partial_max + args.splits * rows;
  }
  fastattn::check_launch(fastattn::attention_decode_fwd_sm90(args, fastattn::current_stream(q)),
                         "attention_decode_fwd");
  return {call.out, call.lse};
}

void attention_decode_append(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k_in, const Tensor& v_in,
                             const Tensor& cache_seqlens, OptionalTensor block_table, OptionalTensor cache_batch_idx) {
  const fastattn::DeviceGuard guard(k_cache.get_device_index());
  CacheCall call(k_in, k_cache, v_cache, cache_seqlens, block_table, cache_batch_idx);
  call.check_appended(k_in, v_in, k_cache, v_cache);
  check_cache(call, k_cache, v_cache);
  if (k_in.numel() == 0 || k_cache.numel() == 0) {
    return;
  }
  const Tensor k = mappable(k_in), v = mappable(v_in);
  DecodeCudaArgs& args = call.args;
  args.k_new = fastattn::heads(k);
  args.v_new = fastattn::heads(v);
  args.seqlen_new = k.size(2);
  fastattn::check_launch(fastattn::attention_decode_append_sm90(args, fastattn::current_stream(k)),
                         "attention_decode_append");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("attention_decode_fwd.native", TORCH_BOX(&fastattn::attention_decode_fwd_op<attention_decode_fwd>));
  m.impl("attention_decode_fwd_native", TORCH_BOX(&fastattn::attention_decode_fwd_op<attention_decode_fwd>));
  m.impl("attention_decode_append.native", TORCH_BOX(&attention_decode_append));
  m.impl("attention_decode_append_native", TORCH_BOX(&attention_decode_append));
}
#endif
