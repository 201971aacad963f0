// out[col] = the sum of a column of x, in fp32.
//
// A call owns columns. The sum over the rows is a tree of sums of halves, whose shape depends only on the number of
// rows.
#include "api.h"
#include "rows.h"

namespace fastattn {

void FASTATTN_CPU_NAME(column_sums)(const ColumnSumsArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.x_dtype, [&](auto x_type) {
    with_dtype(args.out_dtype, [&](auto out_type) {
      const auto* x = static_cast<const decltype(x_type)*>(args.x) + begin;
      auto* out = static_cast<decltype(out_type)*>(args.out) + begin;
      for_columns(end - begin, [&](int64_t i, auto lanes) {
        store(pairwise_sum(0, args.rows, [&](int64_t row) { return load(x + row * args.cols + i, lanes); }), out + i,
              lanes);
      });
    });
  });
}

}  // namespace fastattn
