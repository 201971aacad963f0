// fastattn::attention_decode_fwd and attention_decode_append for CPU tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <tuple>

#include "attention_tensors.h"
#include "dispatch.h"
#include "host.h"

namespace {

using fastattn::contiguous;
using fastattn::DecodeArgs;
using fastattn::HeadTensor;
using fastattn::OptionalTensor;
using fastattn::vector_data;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Which row of the cache holds key `position` of sequence b.
struct Cache {
  const int32_t *block_table, *cache_batch_idx;
  int64_t page_size, pages;

  int64_t page(int64_t b, int64_t position) const {
    return block_table ? block_table[b * pages + position / page_size] : cache_batch_idx ? cache_batch_idx[b] : b;
  }
};

// Checks everything that says where keys are, for sequences that have `more` keys than cache_seqlens says.
Cache locate(const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& block_table,
             const OptionalTensor& cache_batch_idx, const int32_t* cache_seqlens, int64_t batch, int64_t more) {
  STD_TORCH_CHECK(k_cache.dim() == 4 && v_cache.dim() == 4 && k_cache.size(0) == v_cache.size(0) &&
                      k_cache.size(1) == v_cache.size(1) && k_cache.size(2) == v_cache.size(2),
                  "attention_decode: the caches do not fit each other");
  for (const Tensor* t : {&k_cache, &v_cache}) {
    STD_TORCH_CHECK(t->scalar_type() == k_cache.scalar_type(), "attention_decode: the caches must have one dtype");
    STD_TORCH_CHECK(t->size(3) <= 1 || t->stride(3) == 1, "attention_decode: the caches must have last stride 1, got ",
                    t->stride(3));
  }
  STD_TORCH_CHECK(!block_table || (block_table->dim() == 2 && k_cache.size(2) > 0),
                  "attention_decode: block_table must have 2 dimensions and pages must hold keys");
  Cache cache{};
  cache.page_size = std::max<int64_t>(1, k_cache.size(2));
  cache.pages = block_table ? block_table->size(1) : 1;
  cache.block_table = vector_data<int32_t>(block_table, ScalarType::Int, batch * cache.pages, "block_table");
  cache.cache_batch_idx = vector_data<int32_t>(cache_batch_idx, ScalarType::Int, batch, "cache_batch_idx");
  const int64_t rows = k_cache.size(0), capacity = cache.pages * k_cache.size(2);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = cache_seqlens[b] + more;
    STD_TORCH_CHECK(cache_seqlens[b] >= 0 && length <= capacity, "attention_decode: cache_seqlens must be from 0 to ",
                    capacity - more, ", got ", cache_seqlens[b]);
    for (int64_t j = 0; j < length; j += cache.page_size) {
      const int64_t page = cache.page(b, j);
      STD_TORCH_CHECK(page >= 0 && page < rows, "attention_decode: rows of the cache are numbered from 0 to ", rows - 1,
                      ", got ", page);
    }
  }
  return cache;
}

// Into how many parts the keys of a sequence are divided: so many that large machines have work for every thread, each
// long enough to be worth its start. Depends on sizes and lengths alone, so that results do not depend on threads.
int64_t choose_splits(const DecodeArgs& args, int64_t tasks, int64_t wanted) {
  constexpr int64_t kTasks = 64, kMinKeys = 256;
  int64_t longest = 0, all = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    int64_t keys = args.cache_seqlens[b] + args.seqlen_new;
    if (args.window_left >= 0 && args.window_right >= 0) {
      keys = std::min(keys, args.window_left + args.window_right + args.seqlen_q);
    }
    longest = std::max(longest, keys);
    all += keys;
  }
  const int64_t split = wanted > 0 ? std::max<int64_t>(fastattn::kDecodeKeys, (longest + wanted - 1) / wanted)
                                   : std::max(kMinKeys, all * (tasks / std::max<int64_t>(1, args.batch)) / kTasks);
  return std::max<int64_t>(1, (longest + split - 1) / split);
}

std::tuple<Tensor, Tensor> attention_decode_fwd(const Tensor& q_in, const Tensor& k_cache, const Tensor& v_cache,
                                                const Tensor& cache_seqlens_in, OptionalTensor block_table,
                                                OptionalTensor cache_batch_idx, OptionalTensor cache_leftpad,
                                                OptionalTensor alibi_slopes, OptionalTensor sink, int64_t seqlen_new,
                                                int64_t window_left, int64_t window_right, double softcap, double scale,
                                                int64_t num_splits) {
  STD_TORCH_CHECK(q_in.dim() == 4, "attention_decode: q must have 4 dimensions, got ", q_in.dim());
  const Tensor q = fastattn::inner_contiguous(q_in);
  OptionalTensor cache_seqlens = contiguous(cache_seqlens_in);
  for (OptionalTensor* t : {&block_table, &cache_batch_idx, &cache_leftpad, &alibi_slopes, &sink}) {
    *t = contiguous(*t);
  }
  DecodeArgs args{};
  args.dtype = fastattn::dtype_of(q, "q");
  args.batch = q.size(0);
  args.n_heads = q.size(1);
  args.seqlen_q = q.size(2);
  args.head_dim = q.size(3);
  args.seqlen_new = seqlen_new;
  args.cache_seqlens = vector_data<int32_t>(cache_seqlens, ScalarType::Int, args.batch, "cache_seqlens");
  const Cache cache =
      locate(k_cache, v_cache, block_table, cache_batch_idx, args.cache_seqlens, args.batch, seqlen_new);
  args.block_table = cache.block_table;
  args.cache_batch_idx = cache.cache_batch_idx;
  args.page_size = cache.page_size;
  args.pages = cache.pages;
  args.n_kv_heads = k_cache.size(1);
  args.head_dim_v = v_cache.size(3);
  STD_TORCH_CHECK(k_cache.size(3) == args.head_dim && k_cache.scalar_type() == q.scalar_type(),
                  "attention_decode: q does not fit the caches");
  STD_TORCH_CHECK(args.n_heads == args.n_kv_heads || (args.n_kv_heads && args.n_heads % args.n_kv_heads == 0),
                  "attention_decode: the heads of q must be a multiple of those of the caches, got ", args.n_heads,
                  " and ", args.n_kv_heads);
  args.cache_leftpad = vector_data<int32_t>(cache_leftpad, ScalarType::Int, args.batch, "cache_leftpad");
  args.sink = vector_data<float>(sink, ScalarType::Float, args.n_heads, "sink");
  if (alibi_slopes) {
    args.alibi_batch = alibi_slopes->dim() == 2 ? args.n_heads : 0;
    args.alibi_slopes = vector_data<float>(alibi_slopes, ScalarType::Float,
                                           args.n_heads * (args.alibi_batch ? args.batch : 1), "alibi_slopes");
  }
  constexpr int64_t kFar = int64_t{1} << 40;  // as good as unlimited, and sums with it do not overflow
  args.window_left = std::min(window_left, kFar);
  args.window_right = std::min(window_right, kFar);
  args.softcap = static_cast<float>(softcap);
  args.scale = static_cast<float>(scale);
  const Tensor out = fastattn::empty_in_layout(q_in, args.head_dim_v);
  const Tensor lse = fastattn::empty_cpu({args.batch, args.n_heads, args.seqlen_q}, ScalarType::Float);
  const int64_t all_rows = args.n_heads * args.seqlen_q;
  if (args.batch * all_rows == 0) {
    return {out, lse};
  }
  args.q = fastattn::heads(q);
  args.k = fastattn::heads(k_cache);
  args.v = fastattn::heads(v_cache);
  args.out = fastattn::heads(out);
  args.lse = static_cast<float*>(lse.mutable_data_ptr());

  const int64_t rows = std::min(all_rows / args.n_kv_heads, fastattn::kDecodeRows);
  const int64_t blocks = (all_rows / args.n_kv_heads + fastattn::kDecodeRows - 1) / fastattn::kDecodeRows;
  const int64_t groups = args.batch * args.n_kv_heads * blocks;
  args.splits = choose_splits(args, groups, num_splits);
  const int64_t tasks = groups * args.splits;
  OptionalTensor partial;
  std::unique_ptr<std::atomic<int32_t>[]> remaining;
  if (args.splits > 1) {
    partial = fastattn::empty_cpu({tasks * fastattn::decode_partial(rows, args.head_dim_v)}, ScalarType::Float);
    args.partial = static_cast<float*>(partial->mutable_data_ptr());
    remaining.reset(new std::atomic<int32_t>[groups]);
    std::fill_n(remaining.get(), groups, static_cast<int32_t>(args.splits));
    args.remaining = remaining.get();
  }
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  args.next = &next;
  args.failed = &failed;
  const auto kernel = FASTATTN_SELECT_CPU_BF16(attention_decode, args.dtype);
  int64_t keys = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    keys += args.cache_seqlens[b] + seqlen_new;
  }
  // threads take tasks as they come, the first free one the next
  fastattn::for_pieces(tasks, keys * args.n_kv_heads * blocks * (args.head_dim + args.head_dim_v) / tasks + 1,
                       [&](int64_t, int64_t) { kernel(args); });
  STD_TORCH_CHECK(!failed, "attention_decode: out of memory");
  return {out, lse};
}

void append(const Tensor& cache, const Tensor& rows_in, const Cache& where, const int32_t* cache_seqlens) {
  const Tensor rows = fastattn::inner_contiguous(rows_in);
  const HeadTensor to = fastattn::heads(cache), from = fastattn::heads(rows);
  const int64_t heads = rows.size(1), seqlen = rows.size(2), size = rows.size(3) * rows.element_size();
  fastattn::for_pieces(rows.size(0) * heads * seqlen, rows.size(3), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n / seqlen / heads, h = n / seqlen % heads, i = n % seqlen, position = cache_seqlens[b] + i;
      const int64_t at = where.page(b, position) * to.batch + h * to.head + position % where.page_size * to.row;
      std::memcpy(
          static_cast<char*>(to.data) + at * rows.element_size(),
          static_cast<const char*>(from.data) + (b * from.batch + h * from.head + i * from.row) * rows.element_size(),
          size);
    }
  });
}

void attention_decode_append(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
                             const Tensor& cache_seqlens_in, OptionalTensor block_table,
                             OptionalTensor cache_batch_idx) {
  const OptionalTensor cache_seqlens = contiguous(cache_seqlens_in);
  block_table = contiguous(block_table);
  cache_batch_idx = contiguous(cache_batch_idx);
  STD_TORCH_CHECK(k.dim() == 4 && v.dim() == 4 && k.size(0) == v.size(0) && k.size(1) == v.size(1) &&
                      k.size(2) == v.size(2) && k_cache.dim() == 4 && v_cache.dim() == 4 &&
                      k.size(1) == k_cache.size(1) && k.size(3) == k_cache.size(3) && v.size(3) == v_cache.size(3) &&
                      k.scalar_type() == k_cache.scalar_type() && v.scalar_type() == k_cache.scalar_type(),
                  "attention_decode: k and v do not fit each other or the caches");
  const auto* lengths = vector_data<int32_t>(cache_seqlens, ScalarType::Int, k.size(0), "cache_seqlens");
  const Cache where = locate(k_cache, v_cache, block_table, cache_batch_idx, lengths, k.size(0), k.size(2));
  append(k_cache, k, where, lengths);
  append(v_cache, v, where, lengths);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("attention_decode_fwd.native", TORCH_BOX(&attention_decode_fwd));
  m.impl("attention_decode_fwd_native", TORCH_BOX(&attention_decode_fwd));
  m.impl("attention_decode_append.native", TORCH_BOX(&attention_decode_append));
  m.impl("attention_decode_append_native", TORCH_BOX(&attention_decode_append));
}
