// What gemm.cpp and gemm_dots.cpp multiply and add: vectors of floats, or of pairs of bf16.
//
// Where there is an instruction that adds two products of bf16 to a sum (AVX512_BF16), bf16 is taken in pairs, two
// neighbours of K in the place of a float; elsewhere, and fp16, as floats.
#pragma once

#include <array>
#include <utility>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "vector.h"

namespace widenet::WIDENET_LEVEL {

using Vector = Lanes<float>::type;
constexpr int64_t kLanes = Lanes<float>::size;

// How many neighbours of K are packed as one.
template <class T>
constexpr int64_t kPair = 1;
#ifdef __AVX512BF16__
template <>
constexpr int64_t kPair<bfloat16> = 2;
#endif

template <class T>
constexpr int64_t steps(int64_t depth) {
  return (depth + kPair<T> - 1) / kPair<T>;
}

// The lanes of a and b in turn, from lane `first` on.
template <int64_t first, class V, size_t... i>
V interleave(V a, V b, std::index_sequence<i...>) {
  return __builtin_shufflevector(a, b, (first + i / 2 + i % 2 * sizeof...(i))...);
}

// Of a group of gemm_dots.cpp; and the most rows that it is taken for, beyond which to pack pays, as measured: in pairs
// the packed products take half the time, and to widen a vector takes as long as to multiply it.
constexpr int64_t kDotColumns = WIDENET_REGISTER_BYTES == 64 ? 6 : 4;
constexpr int64_t kDotRows = WIDENET_REGISTER_BYTES == 64 ? 72 : 40;
constexpr int64_t kBf16DotRows = WIDENET_REGISTER_BYTES == 64   ? 16 * kPair<bfloat16>
                                 : WIDENET_REGISTER_BYTES == 32 ? 12
                                                                : 0;

// As bits: what is packed may be a pair.
inline Vector broadcast(float x) {
  typedef int32_t Bits __attribute__((vector_size(sizeof(Vector))));
  return std::bit_cast<Vector>(std::bit_cast<int32_t>(x) - Bits{});
}

// sum + a b, lane by lane; of packed pairs, both products of each.
template <class T>
Vector add_products(Vector sum, Vector a, Vector b) {
  if constexpr (kPair<T> == 1) {
    return sum + a * b;
  } else {
#ifdef __AVX512BF16__
    return std::bit_cast<Vector>(
        _mm512_dpbf16_ps(std::bit_cast<__m512>(sum), std::bit_cast<__m512bh>(a), std::bit_cast<__m512bh>(b)));
#endif
  }
}

// to_bfloat16 of a vector.
inline auto to_bfloat16(Vector value) {
#ifdef __AVX512BF16__
  return _mm512_cvtneps_pbh(std::bit_cast<__m512>(value));
#else
  typedef uint32_t Bits __attribute__((vector_size(sizeof(Vector))));
  typedef uint16_t Halves __attribute__((vector_size(sizeof(Vector) / 2)));
  const Bits bits = std::bit_cast<Bits>(value), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(value != value ? (bits >> 16) | 0x40 : rounded, Halves);
#endif
}

// to_float16 of a vector. Without the instruction by way of memory, or the loop is not vectorised.
inline auto to_float16(Vector value) {
#if defined(__AVX512F__)
  return _mm512_cvtps_ph(std::bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return _mm256_cvtps_ph(std::bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT);
#else
  float values[kLanes];
  std::memcpy(values, &value, sizeof(value));
  std::array<float16, kLanes> narrowed;
  for (int64_t i = 0; i < kLanes; ++i) narrowed[i] = to_float16(values[i]);
  return narrowed;
#endif
}

// In registers: if one sum of a tile went by way of memory, the compiler would keep the whole tile there.
template <class T>
void narrow_to(T* out, Vector value) {
  const auto narrowed = [&] {
    if constexpr (std::is_same_v<T, bfloat16>) return to_bfloat16(value);
    if constexpr (std::is_same_v<T, float16>) return to_float16(value);
    if constexpr (std::is_same_v<T, float>) return value;
  }();
  std::memcpy(out, &narrowed, sizeof(narrowed));
}

}  // namespace widenet::WIDENET_LEVEL
