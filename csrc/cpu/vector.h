// What the kernels share: number formats, dispatch over them, dot products.
//
// Everything here lives in the namespace of the level it is compiled for (baseline, avx2, avx512): a function that
// two levels shared could be linked in the form that this CPU cannot run.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace widenet::WIDENET_LEVEL {

// Bits in an enum, not in a struct: the compiler vectorises loops over scalars more readily.
enum class bfloat16 : uint16_t {};
enum class float16 : uint16_t {};

template <class T>
using math_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }

// Rounds to nearest even; a NaN keeps its sign and becomes quiet.
inline bfloat16 to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40;
  return static_cast<bfloat16>(x != x ? nan : rounded);
}

// In integers and exact float products: vectorises at every level and needs no compiler support for the format.
inline float widen(float16 x) {
  const uint32_t sign = (static_cast<uint32_t>(x) & 0x8000u) << 16, rest = (static_cast<uint32_t>(x) & 0x7fffu) << 13;
  // The exponents' biases differ by 112; the product also makes a subnormal half a normal float.
  const float value = std::bit_cast<float>(rest) * 0x1p112f;
  const uint32_t special = rest >= 0x0f800000u ? 0x7f800000u | rest : std::bit_cast<uint32_t>(value);
  return std::bit_cast<float>(sign | special);
}

inline float16 to_float16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Normal: rebias and round to nearest even at bit 13. Subnormal: adding 0.5 lets the float unit round.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  const uint32_t result = magnitude > 0x7f800000u ? nan : magnitude >= 0x477ff000u ? 0x7c00u : finite;
  return static_cast<float16>(sign | result);
}
template <class T, class A>
inline T narrow(A x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return to_bfloat16(static_cast<float>(x));
  } else if constexpr (std::is_same_v<T, float16>) {
    return to_float16(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

// f(T{}) for the C++ type of a dtype.
template <class F>
inline void dispatch(DType type, F&& f) {
  switch (type) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(bfloat16{});
    case DType::f16:
      return f(float16{});
    case DType::f64:
      return f(double{});
  }
}

// f(T{}, A{}): element type and math type; f64 elements have no other math type than double.
template <class F>
inline void dispatch(DType type, DType math, F&& f) {
  dispatch(type, [&](auto t) {
    if (math == DType::f64) {
      f(t, double{});
    } else if constexpr (!std::is_same_v<decltype(t), double>) {
      f(t, float{});
    }
  });
}

#if defined(__AVX512F__)
#define WIDENET_REGISTER_BYTES 64
#elif defined(__AVX__)
#define WIDENET_REGISTER_BYTES 32
#else
#define WIDENET_REGISTER_BYTES 16
#endif

// One register's worth of sums: what is wider, the compiler would take apart through memory.
template <class A>
struct Lanes {
  static constexpr int64_t size = WIDENET_REGISTER_BYTES / sizeof(A);
  typedef A type __attribute__((vector_size(WIDENET_REGISTER_BYTES)));
};

template <class A, class T>
inline typename Lanes<A>::type load(const T* p) {
  typename Lanes<A>::type v;
  if constexpr (std::is_same_v<A, T>) {
    std::memcpy(&v, p, sizeof(v));
  } else {
    A wide[Lanes<A>::size];
    for (int64_t i = 0; i < Lanes<A>::size; ++i) wide[i] = static_cast<A>(widen(p[i]));
    std::memcpy(&v, wide, sizeof(v));
  }
  return v;
}

template <class A>
inline A sum(typename Lanes<A>::type v) {
  A total = 0;
  for (int64_t i = 0; i < Lanes<A>::size; ++i) total += v[i];
  return total;
}

// The sum of p in lanes: the error of a long sum grows with n / lanes.
template <class A>
inline A sum(const A* p, int64_t n) {
  constexpr int64_t lanes = Lanes<A>::size;
  typename Lanes<A>::type parts{};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) parts += load<A>(p + i);
  A total = sum<A>(parts);
  for (; i < n; ++i) total += p[i];
  return total;
}

// Longer sums are taken in pieces of so many elements: the error of a lane grows with what is added in it.
constexpr int64_t kLongestSum = 1024;

// <a, b> in lanes, so that the order of summation does not depend on the caller.
template <class A, class T, class U>
inline A dot(const T* a, const U* b, int64_t n) {
  constexpr int64_t lanes = Lanes<A>::size;
  A total = 0;
  int64_t i = 0;
  while (i + 2 * lanes <= n) {
    typename Lanes<A>::type even{}, odd{};
    const int64_t end = i + kLongestSum < n ? i + kLongestSum : n;
    for (; i + 2 * lanes <= end; i += 2 * lanes) {
      even += load<A>(a + i) * load<A>(b + i);
      odd += load<A>(a + i + lanes) * load<A>(b + i + lanes);
    }
    total += sum<A>(even + odd);
  }
  for (; i < n; ++i) total += static_cast<A>(widen(a[i])) * static_cast<A>(widen(b[i]));
  return total;
}

// Whether a gradient asks anything of its token; NaN does.
template <class A>
inline bool any_nonzero(const A* values, int64_t n) {
  bool found = false;
  for (int64_t i = 0; i < n; ++i) found |= values[i] != 0;
  return found;
}

}  // namespace widenet::WIDENET_LEVEL
