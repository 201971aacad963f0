// fastattn::attention_decode_fwd and attention_decode_append for CPU tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <tuple>

#include "attention_decode_call.h"
#include "decode_run.h"
#include "dispatch.h"
#include "host.h"

namespace {

using fastattn::DecodeArgs;
using fastattn::HeadTensor;
using fastattn::OptionalTensor;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using CacheCall = fastattn::CacheCall<DecodeArgs>;
using Call = fastattn::DecodeCall<DecodeArgs, fastattn::inner_contiguous>;

// Returns the row of the cache that holds key `position` of sequence b.
int64_t page_of(const DecodeArgs& args, int64_t b, int64_t position) {
  return args.block_table       ? args.block_table[b * args.pages + position / args.page_size]
         : args.cache_batch_idx ? args.cache_batch_idx[b]
                                : b;
}

// Checks all arguments that say where keys are. Each sequence has `more` keys in addition to cache_seqlens.
void check_places(const CacheCall& call, const Tensor& k_cache, const Tensor& v_cache, int64_t more) {
  const DecodeArgs& args = call.args;
  for (const Tensor* t : {&k_cache, &v_cache}) {
    STD_TORCH_CHECK(t->size(3) <= 1 || t->stride(3) == 1, "attention_decode: the caches must have last stride 1, got ",
                    t->stride(3));
  }
  STD_TORCH_CHECK(!args.block_table || k_cache.size(2) > 0, "attention_decode: pages must hold keys");
  const int64_t rows = k_cache.size(0), capacity = args.pages * k_cache.size(2);
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t length = args.cache_seqlens[b] + more;
    STD_TORCH_CHECK(args.cache_seqlens[b] >= 0 && length <= capacity,
                    "attention_decode: cache_seqlens must be from 0 to ", capacity - more, ", got ",
                    args.cache_seqlens[b]);
    for (int64_t j = 0; j < length; j += args.page_size) {
      const int64_t page = page_of(args, b, j);
      STD_TORCH_CHECK(page >= 0 && page < rows, "attention_decode: rows of the cache are numbered from 0 to ", rows - 1,
                      ", got ", page);
    }
  }
}

// Chooses the number of splits of the keys of a sequence. There should be enough splits to occupy every thread of a
// large machine, and each should be long enough to pay for its start. The number depends on sizes and lengths only, so
// the results do not depend on the number of threads.
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

std::tuple<Tensor, Tensor> attention_decode_fwd(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                                const fastattn::DecodeInputs& in) {
  Call call(q, k_cache, v_cache, in);
  check_places(call, k_cache, v_cache, in.seqlen_new);
  if (call.rows() > 0) {
    fastattn::run_attention_decode(call.args, in.num_splits);
  }
  return {call.out, call.lse};
}

void append(const Tensor& rows_in, const HeadTensor& to, const DecodeArgs& args) {
  const Tensor rows = fastattn::inner_contiguous(rows_in);
  const int64_t element_size = rows.element_size();
  fastattn::append_rows(
      {fastattn::heads(rows), to, rows.size(1), rows.size(2), rows.size(3) * element_size, element_size}, args);
}

void attention_decode_append(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
                             const Tensor& cache_seqlens, OptionalTensor block_table, OptionalTensor cache_batch_idx) {
  CacheCall call(k, k_cache, v_cache, cache_seqlens, block_table, cache_batch_idx);
  call.check_appended(k, v, k_cache, v_cache);
  check_places(call, k_cache, v_cache, k.size(2));
  append(k, call.args.k, call.args);
  append(v, call.args.v, call.args);
}

}  // namespace

namespace fastattn {

void run_attention_decode(DecodeArgs& args, int64_t num_splits) {
  const int64_t all_rows = args.n_heads * args.seqlen_q;
  const int64_t rows = std::min(all_rows / args.n_kv_heads, kDecodeRows);
  const int64_t blocks = (all_rows / args.n_kv_heads + kDecodeRows - 1) / kDecodeRows;
  const int64_t groups = args.batch * args.n_kv_heads * blocks;
  args.splits = choose_splits(args, groups, num_splits);
  const int64_t tasks = groups * args.splits;
  OptionalTensor partial;
  std::unique_ptr<std::atomic<int32_t>[]> remaining;
  if (args.splits > 1) {
    partial = empty_cpu({tasks * decode_partial(rows, args.head_dim_v)}, ScalarType::Float);
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
    keys += args.cache_seqlens[b] + args.seqlen_new;
  }
  // Each free thread claims the next task.
  for_pieces(tasks, keys * args.n_kv_heads * blocks * (args.head_dim + args.head_dim_v) / tasks + 1,
             [&](int64_t, int64_t) { kernel(args); });
  STD_TORCH_CHECK(!failed, "attention_decode: out of memory");
}

void append_rows(const AppendCall& call, const DecodeArgs& args) {
  const auto [from, to, heads, seqlen, size, element_size] = call;
  const int64_t rows = args.batch * heads * seqlen;
  for_pieces(rows, size / element_size, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n / seqlen / heads, h = n / seqlen % heads, i = n % seqlen;
      const int64_t position = args.cache_seqlens[b] + i;
      const int64_t at = page_of(args, b, position) * to.batch + h * to.head + position % args.page_size * to.row;
      std::memcpy(static_cast<char*>(to.data) + at * element_size,
                  static_cast<const char*>(from.data) + (b * from.batch + h * from.head + i * from.row) * element_size,
                  size);
    }
  });
}

}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("attention_decode_fwd.native", TORCH_BOX(&fastattn::attention_decode_fwd_op<attention_decode_fwd>));
  m.impl("attention_decode_fwd_native", TORCH_BOX(&fastattn::attention_decode_fwd_op<attention_decode_fwd>));
  m.impl("attention_decode_append.native", TORCH_BOX(&attention_decode_append));
  m.impl("attention_decode_append_native", TORCH_BOX(&attention_decode_append));
}
