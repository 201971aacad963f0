#pragma once
// How the norm kernels are divided between threads, for the wrappers that run them.
#include <algorithm>

#include "dispatch.h"
#include "host.h"

namespace fastattn {

inline void run_norm_fwd(const NormFwdArgs& args) {
  const auto rows = FASTATTN_SELECT_CPU(norm_fwd);
  for_pieces(args.rows, args.cols, [&](int64_t begin, int64_t end) { rows(args, begin, end); });
}

// Sets the chunks of args.rows rows, each of which has kNormSums rows of sums.
inline void set_norm_chunks(NormBwdArgs& args) {
  constexpr int64_t kUsualChunks = 64;
  constexpr int64_t kMinRows = 32;   // the rows that a chunk reads at least before it writes its sums
  constexpr int64_t kMaxRows = 256;  // longer chains of additions lose digits
  args.rows_per_chunk = std::clamp((args.rows + kUsualChunks - 1) / kUsualChunks, kMinRows, kMaxRows);
  args.chunks = (args.rows + args.rows_per_chunk - 1) / args.rows_per_chunk;
}

inline void run_norm_bwd(const NormBwdArgs& args) {
  const auto chunks = FASTATTN_SELECT_CPU(norm_bwd);
  const auto columns = FASTATTN_SELECT_CPU(norm_bwd_columns);
  for_pieces(args.chunks, std::min(args.rows, args.rows_per_chunk) * args.cols,
             [&](int64_t begin, int64_t end) { chunks(args, begin, end); });
  if (args.dweight || args.dbias || args.dx_bias) {
    for_pieces(args.cols, std::max<int64_t>(1, args.chunks),
               [&](int64_t begin, int64_t end) { columns(args, begin, end); });
  }
}

}  // namespace fastattn
