#pragma once
// How the passes of the feed-forward block are divided between threads, for the wrappers that run them.
#include <utility>

#include "column_sums_run.h"

namespace fastattn {

inline void run_activation_fwd(const ActivationArgs& args) {
  const auto kernel = FASTATTN_SELECT_CPU(activation_fwd);
  for_pieces(args.rows, args.cols, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// The blocks of rows, each of which has a row of partial sums for each bias.
inline int64_t activation_blocks(const ActivationArgs& args) {
  return (args.rows + kActivationBlockRows - 1) / kActivationBlockRows;
}

inline void run_activation_bwd(const ActivationArgs& args) {
  const int64_t blocks = activation_blocks(args);
  const auto kernel = FASTATTN_SELECT_CPU(activation_bwd);
  for_pieces(blocks, kActivationBlockRows * args.cols, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  for (const auto& [partial, dbias] :
       {std::pair(args.dbias_partial, args.dbias), std::pair(args.dbias_gate_partial, args.dbias_gate)}) {
    if (dbias) {
      run_column_sums({partial, dbias, blocks, args.cols, DType::kFloat32, args.dtype});
    }
  }
}

}  // namespace fastattn
