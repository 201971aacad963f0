#pragma once
// How the passes of the feed-forward block are divided between threads, for the wrappers that run them.
#include <algorithm>

#include "dispatch.h"
#include "host.h"

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
  if (args.dbias || args.dbias_gate) {
    const auto sums = FASTATTN_SELECT_CPU(activation_dbias);
    for_pieces(args.cols, std::max<int64_t>(1, blocks), [&](int64_t begin, int64_t end) { sums(args, begin, end); });
  }
}

}  // namespace fastattn
