// The experts' activations and their derivatives; branch-free in float, so that loops over them vectorise.
#pragma once

#include <cmath>

#include "vector.h"

namespace widenet::WIDENET_LEVEL {

// e^x for x <= 0 (0 below -87.3, where float would go subnormal), relative error below 2 ulp; NaN stays NaN.
inline float exp_negative(float x) {
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const float low = x < -87.3f ? -87.3f : x;
  const float shifted = low * kLog2e + kRound;
  const float n = shifted - kRound;
  const float r = low - n * kLn2High - n * kLn2Low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float scale = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + (127u << 23));
  return x < -87.3f ? 0.0f : p * scale;
}

inline double exp_negative(double x) { return std::exp(x); }

inline float magnitude(float x) { return std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0x7fffffffu); }
inline double magnitude(double x) { return std::fabs(x); }

template <class A>
struct Value {
  A value, derivative;
};

// The slope is s (1 - s), without the difference: near s = 1 it would keep few digits.
template <class A>
inline Value<A> sigmoid(A x) {
  const A e = exp_negative(-magnitude(x));
  const A inverse = 1 / (1 + e);
  return {x < 0 ? e * inverse : inverse, e * inverse * inverse};
}

// x Phi(x), Phi the normal distribution function (Hendrycks and Gimpel 2016, arXiv 1606.08415).
struct Gelu {
  static Value<float> both(float x) {
    // Phi(-|x|) = e^(-x^2/2) t P(t), t = 1 / (1 + p |x| / sqrt 2): the form of Abramowitz and Stegun 7.1.26 with a
    // polynomial of degree 9 fitted to a relative error of 4e-9, so that the tails are right too.
    constexpr float kP = 0.3275911f * 0.707106781f, kInverseRoot2Pi = 0.398942280f;
    const float t = 1.0f / (1.0f + kP * magnitude(x));
    const float e = exp_negative(-0.5f * x * x);
    float p = 0.0575467216f;
    p = p * t - 0.321985713f;
    p = p * t + 0.639137319f;
    p = p * t - 0.576339362f;
    p = p * t + 0.515485876f;
    p = p * t - 0.0583230399f;
    p = p * t + 0.208848561f;
    p = p * t + 0.164975791f;
    p = p * t + 0.185879544f;
    p = p * t + 0.184774299f;
    const float tail = 0.5f * e * t * p;
    const float phi = x > 0.0f ? 1.0f - tail : tail;
    return {x * phi, phi + x * e * kInverseRoot2Pi};
  }
  static Value<double> both(double x) {
    const double phi = 0.5 * std::erfc(-x * M_SQRT1_2);
    return {x * phi, phi + x * std::exp(-0.5 * x * x) * (0.5 * M_2_SQRTPI * M_SQRT1_2)};
  }
};

struct GeluTanh {
  template <class A>
  static Value<A> both(A x) {
    // 0.5 (1 + tanh u) = sigmoid(2u)
    constexpr A kRoot = static_cast<A>(0.7978845608028654), kCubic = static_cast<A>(0.044715);
    const auto [s, slope] = sigmoid(2 * kRoot * (x + kCubic * x * x * x));
    return {x * s, s + 2 * x * slope * kRoot * (1 + 3 * kCubic * x * x)};
  }
};

struct Relu {
  template <class A>
  static Value<A> both(A x) {
    return {x < 0 ? 0 : x, static_cast<A>(x > 0)};  // NaN stays NaN
  }
};

struct Silu {
  template <class A>
  static Value<A> both(A x) {
    const auto [s, slope] = sigmoid(x);
    return {x * s, s + x * slope};
  }
};

// f(Act{}) for the curve of an activation; a gated one has the curve of its gate half.
template <class F>
inline void dispatch(Activation act, F&& f) {
  switch (act) {
    case Activation::gelu:
    case Activation::geglu:
      return f(Gelu{});
    case Activation::gelu_tanh:
      return f(GeluTanh{});
    case Activation::relu:
      return f(Relu{});
    case Activation::silu:
    case Activation::swiglu:
      return f(Silu{});
    case Activation::none:
      return;
  }
}

}  // namespace widenet::WIDENET_LEVEL
