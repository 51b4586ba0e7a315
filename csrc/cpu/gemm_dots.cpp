// out = a b where the rows of a and the columns of b each lie in one piece along K: dot products, a vector of K at a
// time, and nothing is packed. For few rows, which read a packed b too seldom to pay for the packing.
//
// A piece of K of kDotColumns columns of b stays in the first-level cache while all rows pass it, kTileRows at a time;
// kTileRows x kDotColumns vectors of sums stay in registers for a piece, and a stays in the second-level cache. 2 M N K
// flops; b is read once, a once for every kDotColumns columns, out is written once. The pieces are the same whatever
// the threads do, so the bits are too.
#include <algorithm>
#include <array>

#include "levels.h"
#include "pack.h"

namespace widenet::WIDENET_LEVEL {
namespace {

constexpr int64_t kTileRows = WIDENET_REGISTER_BYTES == 64 ? 4 : 2;
constexpr int64_t kPieceBytes = 4096;  // of a line
static_assert(kDotRows % kTileRows == 0 && kBf16DotRows <= kDotRows);

// The sums of a tile, row by row, in whole vectors.
using Sums = std::array<float, (kTileRows * kDotColumns + kLanes - 1) / kLanes * kLanes>;

// The sums over the lanes of n vectors, `stride` apart, in the lanes of one.
template <int64_t n, int64_t stride = 1>
Vector sums_over_lanes(const Vector* v) {
  if constexpr (n == 1) {
    return *v;
  } else {
    constexpr std::make_index_sequence<kLanes> lanes;
    const Vector even = sums_over_lanes<n / 2, 2 * stride>(v), odd = sums_over_lanes<n / 2, 2 * stride>(v + stride);
    return interleave<0>(even, odd, lanes) + interleave<kLanes / 2>(even, odd, lanes);
  }
}

// sums += the products of `rows` rows and kDotColumns columns in a piece. `ahead` is what comes next of b.
template <class T, int64_t rows>
__attribute__((noinline)) void add_tile(const Lines<T>& a, const Lines<T>& b, const Lines<T>& ahead, float* sums) {
  constexpr int64_t step = kLanes * kPair<T>, size = rows * kDotColumns, padded = (size + kLanes - 1) / kLanes * kLanes;
  Vector products[size] = {};
  int64_t p = 0;
  for (; p + step <= a.depth; p += step) {
    for (int64_t j = 0; j < ahead.count; ++j) prefetch(ahead.from + j * ahead.stride + p);
    Vector columns[kDotColumns];
#pragma GCC unroll 8
    for (int64_t j = 0; j < kDotColumns; ++j) columns[j] = packed_of(b.from + j * b.stride + p);
#pragma GCC unroll 8
    for (int64_t i = 0; i < rows; ++i) {
      const Vector row = packed_of(a.from + i * a.stride + p);
#pragma GCC unroll 8
      for (int64_t j = 0; j < kDotColumns; ++j) {
        products[i * kDotColumns + j] = add_products<T>(products[i * kDotColumns + j], row, columns[j]);
      }
    }
  }
  Vector in_turn[padded] = {};  // a copy, or the products are not in registers before
#pragma GCC unroll 32
  for (int64_t i = 0; i < size; ++i) in_turn[i] = products[i];
#pragma GCC unroll 8
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Vector sum = load<float>(sums + i) + sums_over_lanes<kLanes>(in_turn + i);
    std::memcpy(sums + i, &sum, sizeof(sum));
  }
  for (; p < a.depth; ++p) {  // what is less than a vector
    for (int64_t i = 0; i < rows; ++i) {
      const float row = widen(a.from[i * a.stride + p]);
      for (int64_t j = 0; j < kDotColumns; ++j) sums[i * kDotColumns + j] += row * widen(b.from[j * b.stride + p]);
    }
  }
}

template <class T>
void add_rows(const Lines<T>& a, const Lines<T>& b, const Lines<T>& ahead, Sums& sums) {
  static_assert(kTileRows <= 4);
  const auto form = a.count == 4   ? add_tile<T, kTileRows>
                    : a.count == 3 ? add_tile<T, kTileRows - 1>
                    : a.count == 2 ? add_tile<T, 2>
                                   : add_tile<T, 1>;
  form(a, b, ahead, sums.data());
}

template <class T>
void put(const Sums& sums, T* out, int64_t stride, int64_t rows) {
  T values[std::tuple_size_v<Sums>];
  for (size_t i = 0; i < sums.size(); i += kLanes) narrow_to(values + i, load<float>(&sums[i]));
  for (int64_t i = 0; i < rows; ++i) std::memcpy(out + i * stride, values + i * kDotColumns, kDotColumns * sizeof(T));
}

// `count` of the lines from `first` on, as far as they go, and a piece of their K.
template <class T>
Lines<T> part(const Lines<T>& lines, int64_t first, int64_t count, int64_t k) {
  const int64_t begin = std::min(first, lines.count);
  return {lines.from + begin * lines.stride + k, std::min(count, lines.count - begin), lines.stride,
          std::min<int64_t>(kPieceBytes / sizeof(T), lines.depth - k), 1};
}

// All rows of a, at most kDotRows, with kDotColumns columns of b. Each tile of rows fetches its share of what comes
// then: the same columns' next piece, or the first of `next`.
template <class T>
void multiply_columns(const Lines<T>& a, const Lines<T>& b, const Lines<T>& next, T* out, int64_t out_stride) {
  constexpr int64_t piece = kPieceBytes / sizeof(T);
  const int64_t tiles = (a.count + kTileRows - 1) / kTileRows, share = (kDotColumns + tiles - 1) / tiles;
  Sums sums[kDotRows / kTileRows];  // with AVX-512 2.3 KiB
  std::fill_n(sums, tiles, Sums{});
  for (int64_t k = 0; k < a.depth; k += piece) {
    const bool last = k + piece >= a.depth;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      add_rows(part(a, tile * kTileRows, kTileRows, k), part(b, 0, kDotColumns, k),
               part(last ? next : b, tile * share, share, last ? 0 : k + piece), sums[tile]);
    }
  }
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t row = tile * kTileRows;
    put(sums[tile], out + row * out_stride, out_stride, std::min(kTileRows, a.count - row));
  }
}

template <class T>
void multiply_group(const GemmArgs& args, int64_t column) {
  const Lines<T> a{static_cast<const T*>(args.a.data), args.m, args.a.row_stride, args.k, 1};
  const auto columns = [&](int64_t first) {
    const auto* from = static_cast<const T*>(args.b.data) + first * args.b.column_stride;
    return Lines<T>{from, std::clamp<int64_t>(args.n - first, 0, kDotColumns), args.b.column_stride, args.k, 1};
  };
  multiply_columns(a, columns(column), columns(column + kDotColumns), static_cast<T*>(args.out) + column,
                   args.out_stride);
}

template <class T>
void multiply_groups(const GemmArgs& args, int64_t begin, int64_t end) {
  for (int64_t group = begin; group < end; ++group) multiply_group<T>(args, group * kDotColumns);
  // what is less than a group, with some columns of the last again
  if (end * kDotColumns + kDotColumns > args.n && end * kDotColumns < args.n)
    multiply_group<T>(args, args.n - kDotColumns);
}

}  // namespace

void gemm_dots(const GemmArgs& args, int64_t begin, int64_t end) {
  if (args.type == DType::f32) return multiply_groups<float>(args, begin, end);
  multiply_groups<bfloat16>(args, begin, end);
}

}  // namespace widenet::WIDENET_LEVEL
