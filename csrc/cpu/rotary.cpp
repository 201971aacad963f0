// Rotary position embedding:  y1 = x1 * cos - x2 * sin,  y2 = x2 * cos + x1 * sin,  over the pairs of the first
// rotary_dim channels. The other channels are copied. The backward is the same with -sin. The tables may have a number
// for each channel: then cos and sin are cos1 and sin1 in y1, cos2 and sin2 in y2, and the backward has -sin2 and
// -sin1.
//
// A piece is kRotaryTokens tokens with all heads of both tensors. Their rows of the tables are gathered and widened
// once, in the form that the loop over a head reads: if half-split, the numbers of the first channels, then those of
// the second ones; if interleaved, a number for each channel, with sin as -sin, +sin, so that y = x * cos + swapped(x)
// * sin.
#include <cstring>

#include "api.h"
#include "rows.h"

namespace fastattn {
namespace {

constexpr int64_t kPairs = 128;  // gathered at a time

struct Tables {
  alignas(64) float cos[kRotaryTokens * 2 * kPairs];
  alignas(64) float sin[kRotaryTokens * 2 * kPairs];
};

int64_t position_of(const RotaryArgs& args, int64_t batch, int64_t token) {
  if (!args.positions) {
    return args.offset + token;
  }
  const int64_t at = batch * args.positions_batch + token;
  return args.wide_positions ? static_cast<const int64_t*>(args.positions)[at]
                             : static_cast<const int32_t*>(args.positions)[at];
}

// Gathers columns [first, first + n) of the tables for `tokens` tokens from `token` on.
template <typename W>
void gather(Tables& tables, const RotaryArgs& args, int64_t batch, int64_t token, int64_t tokens, int64_t first,
            int64_t n) {
  const float sign = args.conjugate ? -1.f : 1.f;
  const int64_t step = args.table_step;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t at = batch * args.table_batch + position_of(args, batch, token + t) * args.table_row + first * step;
    float* cos_row = tables.cos + t * 2 * kPairs;
    float* sin_row = tables.sin + t * 2 * kPairs;
    for (int64_t which = 0; which < (args.interleaved || args.table_second ? 2 : 1); ++which) {
      const W* cos = static_cast<const W*>(args.cos) + at + (which ? args.table_second : 0);
      const W* sin = static_cast<const W*>(args.sin) + at + (which != args.conjugate ? args.table_second : 0);
      if (args.interleaved) {
        for (int64_t i = 0; i < n; ++i) {
          cos_row[2 * i + which] = to_float(cos[i * step]);
          sin_row[2 * i + which] = (which ? sign : -sign) * to_float(sin[i * step]);
        }
      } else if (step != 1) {
        for (int64_t i = 0; i < n; ++i) {
          cos_row[which * kPairs + i] = to_float(cos[i * step]);
          sin_row[which * kPairs + i] = sign * to_float(sin[i * step]);
        }
      } else {
        for_columns(n, [&](int64_t i, auto lanes) {
          store(load(cos + i, lanes), cos_row + which * kPairs + i, lanes);
          store(load(sin + i, lanes) * Vec::fill(sign), sin_row + which * kPairs + i, lanes);
        });
      }
    }
  }
}

// Rotates n pairs of one row. In a half-split pair, `half` channels lie between the two; 0 means interleaved. kFull:
// the second channels of half-split pairs have numbers of their own.
template <bool kFull, typename T>
void rotate(const T* x, T* out, const float* cos, const float* sin, int64_t n, int64_t half, bool stream) {
  if (half == 0) {
    for_columns(2 * n, [&](int64_t i, auto lanes) {
      const Vec v = load(x + i, lanes);
      put(fma(v, load(cos + i, lanes), swap_pairs(v) * load(sin + i, lanes)), out + i, lanes, stream);
    });
    return;
  }
  for_columns(n, [&](int64_t i, auto lanes) {
    const Vec x1 = load(x + i, lanes), x2 = load(x + half + i, lanes);
    const Vec c = load(cos + i, lanes), s = load(sin + i, lanes);
    put(fnma(x2, s, x1 * c), out + i, lanes, stream);
    const Vec c2 = kFull ? load(cos + kPairs + i, lanes) : c, s2 = kFull ? load(sin + kPairs + i, lanes) : s;
    put(fma(x1, s2, x2 * c2), out + half + i, lanes, stream);
  });
}

// True if every vector of every row may be stored past the caches.
template <typename T>
bool rows_stream(const RotaryArgs& args, int which) {
  const HeadTensor& out = args.out[which];
  const auto aligned = [](int64_t elements) { return elements * sizeof(T) % 64 == 0; };
  return out.data != args.x[which].data && aligned(out.batch) && aligned(out.head) && aligned(out.row) &&
         aligned(args.rotary_dim / 2) &&
         streams(static_cast<const T*>(out.data), args.batch * args.seqlen * args.n_heads[which], args.head_dim);
}

template <typename T, typename W>
void rotate_pieces(const RotaryArgs& args, int64_t begin, int64_t end) {
  Tables tables;
  const int64_t half = args.rotary_dim / 2;
  const int64_t pieces = (args.seqlen + kRotaryTokens - 1) / kRotaryTokens;
  const bool stream[2] = {rows_stream<T>(args, 0), rows_stream<T>(args, 1)};
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t batch = piece / pieces;
    const int64_t token = piece % pieces * kRotaryTokens;
    const int64_t tokens = args.seqlen - token < kRotaryTokens ? args.seqlen - token : kRotaryTokens;
    for (int64_t first = 0; first < half; first += kPairs) {
      const int64_t n = half - first < kPairs ? half - first : kPairs;
      gather<W>(tables, args, batch, token, tokens, first, n);
      for (int which = 0; which < 2; ++which) {
        const HeadTensor &in = args.x[which], &to = args.out[which];
        const int64_t heads = args.n_heads[which];
        const bool heads_inside = in.row >= in.head;  // follow the memory order: heads of a token, or tokens of a head
        for (int64_t i = 0; i < tokens * heads; ++i) {
          const int64_t t = heads_inside ? i / heads : i % tokens;
          const int64_t head = heads_inside ? i % heads : i / tokens;
          const T* x = static_cast<const T*>(in.data) + batch * in.batch + head * in.head + (token + t) * in.row;
          T* out = static_cast<T*>(to.data) + batch * to.batch + head * to.head + (token + t) * to.row;
          const int64_t at = args.interleaved ? 2 * first : first;
          const auto row = args.table_second ? rotate<true, T> : rotate<false, T>;
          row(x + at, out + at, tables.cos + t * 2 * kPairs, tables.sin + t * 2 * kPairs, n,
              args.interleaved ? 0 : half, stream[which]);
          if (first == 0 && out != x && args.head_dim > args.rotary_dim) {
            std::memcpy(out + args.rotary_dim, x + args.rotary_dim, (args.head_dim - args.rotary_dim) * sizeof(T));
          }
        }
      }
    }
  }
  end_of_streams();
}

}  // namespace

void FASTATTN_CPU_NAME(rotary_fwd)(const RotaryArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto x) {
    with_dtype(args.table_dtype, [&](auto table) { rotate_pieces<decltype(x), decltype(table)>(args, begin, end); });
  });
}

}  // namespace fastattn
