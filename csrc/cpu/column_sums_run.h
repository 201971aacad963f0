#pragma once
// How column sums are divided between threads, for the wrappers that need them.
#include <algorithm>

#include "dispatch.h"
#include "host.h"

namespace fastattn {

inline void run_column_sums(const ColumnSumsArgs& args) {
  const auto kernel = FASTATTN_SELECT_CPU(column_sums);
  for_pieces(args.cols, std::max<int64_t>(1, args.rows), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace fastattn
