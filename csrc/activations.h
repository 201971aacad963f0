#pragma once
// The activations of the feed-forward block: value and slope at a point, for CPU vectors and for CUDA threads.
//
//   gelu       x * P(x), P the normal distribution                    slope P(x) + x * exp(-x^2 / 2) / sqrt(2 pi)
//   gelu_tanh  x * s(2 sqrt(2 / pi) (x + 0.044715 x^3)), s = sigmoid, since (1 + tanh(z)) / 2 = s(2 z)
//   silu       x * s(x)                                               slope s + x * s * (1 - s) * inner'
//
// V is a number, or a vector of numbers, with fill, + - * /, <, fma, exp, abs, min, max and select. If an operand of
// min or max is NaN, the result is the second operand.
#include "api.h"
#include "philox.h"  // FASTATTN_HOST_DEVICE

namespace fastattn {
namespace {

template <typename V>
struct Point {
  V value;
  V slope;
};

// The sigmoid 1 / (1 + e^-x) and 1 minus it, both to full relative precision.
template <typename V>
struct Sigmoid {
  V value;
  V complement;

  FASTATTN_HOST_DEVICE explicit Sigmoid(V x) {
    const V e = exp(-x);
    value = V::fill(1.f) / (V::fill(1.f) + e);
    complement = min(V::fill(0x1p126f), e) * value;  // the bound avoids inf * 0
  }
};

template <typename V>
struct Gelu {
  FASTATTN_HOST_DEVICE static Point<V> at(V x) {
    // P(-a) = exp(-a^2 / 2) * q(1 / (1 + 0.4 a)) for a >= 0. q was fitted to erfcx; its relative error is 9e-8.
    const V a = min(V::fill(15.f), abs(x));
    const V t = V::fill(1.f) / fma(V::fill(0.4f), a, V::fill(1.f));
    const V e = exp(V::fill(-0.5f) * a * a);
    V q = V::fill(-0.03922225534915924f);
    for (float c : {0.19896432757377625f, -0.3707125782966614f, 0.24802842736244202f, -0.010648469440639019f,
                    0.15779447555541992f, 0.15591822564601898f, 0.15988917648792267f, -1.1282214472885244e-05f}) {
      q = fma(q, t, V::fill(c));
    }
    const V tail = e * q;
    const V p = select(x < V::fill(0.f), tail, V::fill(1.f) - tail);
    return {x * p, fma(x * V::fill(0.3989422804f), e, p)};
  }
};

template <typename V>
struct GeluTanh {
  FASTATTN_HOST_DEVICE static Point<V> at(V x) {
    const V c1 = V::fill(1.5957691216f);  // 2 sqrt(2 / pi)
    const V c3 = V::fill(0.0713548163f);  // c1 * 0.044715
    const V square = x * x;
    const Sigmoid<V> s(x * fma(c3, square, c1));
    const V inner_slope = fma(V::fill(3.f) * c3, square, c1);
    return {x * s.value, fma(x * inner_slope, s.value * s.complement, s.value)};
  }
};

template <typename V>
struct Relu {
  FASTATTN_HOST_DEVICE static Point<V> at(V x) {
    const V zero = V::fill(0.f), one = V::fill(1.f);
    return {max(zero, x), select(x < one, select(zero < x, one, zero), one)};  // 1 if x is NaN, as in PyTorch
  }
};

template <typename V>
struct Relu2 {
  FASTATTN_HOST_DEVICE static Point<V> at(V x) {
    const V r = max(V::fill(0.f), x);
    return {r * r, r + r};
  }
};

template <typename V>
struct Silu {
  FASTATTN_HOST_DEVICE static Point<V> at(V x) {
    const Sigmoid<V> s(x);
    return {x * s.value, fma(x, s.value * s.complement, s.value)};
  }
};

// Calls body(act), where act has the type whose static function `at` computes the activation.
template <typename V, typename Body>
void with_activation(Activation activation, Body body) {
  switch (activation) {
    case Activation::kGelu:
      return body(Gelu<V>());
    case Activation::kGeluTanh:
      return body(GeluTanh<V>());
    case Activation::kRelu:
      return body(Relu<V>());
    case Activation::kRelu2:
      return body(Relu2<V>());
    case Activation::kSilu:
      return body(Silu<V>());
  }
}

}  // namespace
}  // namespace fastattn
