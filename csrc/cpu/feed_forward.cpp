// The passes of the feed-forward block between its matrix products.
//
//   forward    hidden = act(preact) * keep * scale                    gated: act(gate) * preact * keep * scale
//   backward   dact = dhidden * keep * scale
//              dpreact = dact * act'(preact)                          gated: dact * act(gate)
//                                                                            dgate = dact * preact * act'(gate)
//              dbias = sum_rows(dpreact), dbias_gate = sum_rows(dgate), and hidden again for the gradient of w2
//
// The forward owns whole rows. The backward owns whole blocks of kActivationBlockRows rows, each with one row of
// partial sums, which column_sums adds. So the sums do not depend on the number of threads. Registers hold fp32.
#include <algorithm>

#include "activations.h"
#include "api.h"
#include "philox_vec.h"
#include "vec.h"

namespace fastattn {
namespace {

constexpr int64_t kChunk = 512;  // keep bits are drawn for this many columns at a time

// How a step reads and writes one vector: the whole vector, or its first n elements at the end of a row.
struct Whole {
  template <typename T>
  Vec load(const T* p) const {
    return Vec::load(p);
  }
  template <typename T>
  void store(Vec v, T* p) const {
    v.store(p);
  }
};

struct First {
  int n;
  template <typename T>
  Vec load(const T* p) const {
    return Vec::load(p, n);
  }
  template <typename T>
  void store(Vec v, T* p) const {
    v.store(p, n);
  }
};

template <typename T>
inline T* row_of(T* base, int64_t row, int64_t stride) {
  return base ? base + row * stride : nullptr;
}

// The rows that the steps read and write. A null pointer means that the call has no such tensor.
template <typename T>
struct Row {
  const T *preact, *gate, *dhidden;
  T *hidden, *dpreact, *dgate;
  float *dbias, *dbias_gate;
  float scale;
  const uint8_t* keep = nullptr;  // the keep bits of the chunk that begins at column `first`
  int64_t first = 0;

  Row(const ActivationArgs& args, int64_t row)
      : preact(row_of(static_cast<const T*>(args.preact), row, args.preact_stride)),
        gate(row_of(static_cast<const T*>(args.gate), row, args.gate_stride)),
        dhidden(row_of(static_cast<const T*>(args.dhidden), row, args.dhidden_stride)),
        hidden(row_of(static_cast<T*>(args.hidden), row, args.cols)),
        dpreact(row_of(static_cast<T*>(args.dpreact), row, args.cols)),
        dgate(row_of(static_cast<T*>(args.dgate), row, args.cols)),
        dbias(row_of(args.dbias_partial, row / kActivationBlockRows, args.cols)),
        dbias_gate(row_of(args.dbias_gate_partial, row / kActivationBlockRows, args.cols)),
        scale(args.dropout.scale) {}

  // A dropped element is 0 even if x is inf or NaN.
  Vec dropout(Vec x, int64_t i) const {
    return select(keep_mask(keep, i - first), x * Vec::fill(scale), Vec::fill(0.f));
  }
};

template <typename Act>
struct Forward {
  template <typename T, typename Access>
  static void step(const Row<T>& row, int64_t i, Access access) {
    const Vec preact = access.load(row.preact + i);
    Vec hidden = row.gate ? Act::at(access.load(row.gate + i)).value * preact : Act::at(preact).value;
    if (row.keep) {
      hidden = row.dropout(hidden, i);
    }
    access.store(hidden, row.hidden + i);
  }
};

template <typename Act>
struct Backward {
  template <typename T, typename Access>
  static void step(const Row<T>& row, int64_t i, Access access) {
    const Vec preact = access.load(row.preact + i);
    const Point<Vec> point = Act::at(row.gate ? access.load(row.gate + i) : preact);
    Vec dact = access.load(row.dhidden + i);
    Vec hidden = row.gate ? point.value * preact : point.value;
    if (row.keep) {
      dact = row.dropout(dact, i);
      hidden = row.dropout(hidden, i);
    }
    if (row.hidden) {
      access.store(hidden, row.hidden + i);
    }
    const Vec dpreact = dact * (row.gate ? point.value : point.slope);
    access.store(dpreact, row.dpreact + i);
    if (row.dbias) {
      access.store(access.load(row.dbias + i) + dpreact, row.dbias + i);
    }
    if (row.gate) {
      const Vec dgate = dact * preact * point.slope;
      access.store(dgate, row.dgate + i);
      if (row.dbias_gate) {
        access.store(access.load(row.dbias_gate + i) + dgate, row.dbias_gate + i);
      }
    }
  }
};

template <typename Pass, typename T>
void run_rows(const ActivationArgs& args, int64_t begin, int64_t end) {
  uint8_t keep[keep_bytes(kChunk)];
  for (int64_t r = begin; r < end; ++r) {
    Row<T> row(args, r);
    for (int64_t chunk = 0; chunk < args.cols; chunk += kChunk) {
      const int64_t chunk_end = std::min(args.cols, chunk + kChunk);
      if (args.dropout.rng) {
        draw_keep(args.dropout, static_cast<uint32_t>(r), static_cast<uint32_t>(r >> 32), chunk, chunk_end - chunk,
                  keep);
        row.keep = keep;
        row.first = chunk;
      }
      int64_t i = chunk;
      for (; i + Vec::kSize <= chunk_end; i += Vec::kSize) {
        Pass::step(row, i, Whole{});
      }
      if (i < chunk_end) {
        Pass::step(row, i, First{static_cast<int>(chunk_end - i)});
      }
    }
  }
}

template <template <typename> class Pass, typename T>
void run_activation(const ActivationArgs& args, int64_t begin, int64_t end) {
  with_activation<Vec>(args.activation, [&](auto act) { run_rows<Pass<decltype(act)>, T>(args, begin, end); });
}

template <template <typename> class Pass>
void run(const ActivationArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kFloat32:
      return run_activation<Pass, float>(args, begin, end);
    case DType::kBFloat16:
      return run_activation<Pass, BF16>(args, begin, end);
    case DType::kFloat16:
      return run_activation<Pass, FP16>(args, begin, end);
  }
}

}  // namespace

void FASTATTN_CPU_NAME(activation_fwd)(const ActivationArgs& args, int64_t begin, int64_t end) {
  run<Forward>(args, begin, end);
}

void FASTATTN_CPU_NAME(activation_bwd)(const ActivationArgs& args, int64_t begin, int64_t end) {
  for (float* partial : {args.dbias_partial, args.dbias_gate_partial}) {
    if (partial) {
      std::fill(partial + begin * args.cols, partial + end * args.cols, 0.f);
    }
  }
  run<Backward>(args, begin * kActivationBlockRows, std::min(args.rows, end * kActivationBlockRows));
}

}  // namespace fastattn
