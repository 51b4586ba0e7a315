// How the operands of gemm.cpp are packed, in panels of lines side by side, step by step along K.
#pragma once

#include <algorithm>

#include "products.h"

namespace widenet::WIDENET_LEVEL {

constexpr int64_t kLine = 64;  // bytes, of the caches

// n vectors of n lanes become their transpose: log n times every vector is interleaved with its partner half way on.
inline void transpose(Vector* v) {
  constexpr std::make_index_sequence<kLanes> lanes;
  for (int64_t step = 1; step < kLanes; step *= 2) {
    Vector next[kLanes];
    for (int64_t i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave<0>(v[i], v[i + kLanes / 2], lanes);
      next[2 * i + 1] = interleave<kLanes / 2>(v[i], v[i + kLanes / 2], lanes);
    }
    for (int64_t i = 0; i < kLanes; ++i) v[i] = next[i];
  }
}

// What the next panel will read there, to the second-level cache. A hint: at the end of a tensor nothing is accessed.
inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

// What is packed of a line at p, of which `left` are left along K: a float, or the bits of a pair (0 behind the end).
template <class T>
float packed_of(const T* at, int64_t depth_stride, int64_t left) {
  if constexpr (kPair<T> == 1) {
    return widen(*at);
  } else {
    const uint32_t second = left > 1 ? 0xffff0000u : 0;
    return std::bit_cast<float>(static_cast<uint32_t>(at[0]) |
                                ((static_cast<uint32_t>(at[left > 1 ? depth_stride : 0]) << 16) & second));
  }
}

// The same for whole vectors of neighbours along K.
template <class T>
Vector packed_of(const T* at) {
  if constexpr (kPair<T> == 1) {
    return load<float>(at);
  } else {
    Vector pairs;
    std::memcpy(&pairs, at, sizeof(pairs));
    return pairs;
  }
}

// Two rows of bf16 as pairs, one of each row, in two vectors of half as many.
template <int64_t columns>
struct Pairs {
  typedef uint16_t Row __attribute__((vector_size(columns * sizeof(uint16_t))));
  Row low, high;
  Pairs(const void* row, const void* next) {  // without a next row its halves are 0
    constexpr std::make_index_sequence<columns> lanes;
    Row first, second{};
    std::memcpy(&first, row, sizeof(first));
    if (next) std::memcpy(&second, next, sizeof(second));
    low = interleave<0>(first, second, lanes);
    high = interleave<columns / 2>(first, second, lanes);
  }
};

// Lines side by side, as many as fill panels of `width`, the last with zeros:
// packed[panel][p][i] = from[(panel * width + i) * stride + p * depth_stride], or pairs of them.
template <class T>
struct Lines {
  const T* from;
  int64_t count, stride, depth, depth_stride;
};

// Neighbours in memory are neighbours in a panel: from end to end through memory, which is read ahead of its use. What
// a vector of pairs writes over the edge of its panel's step, the next step writes again; so the last goes without.
template <int64_t width, class T>
void pack_side_by_side(const Lines<T>& lines, float* packed) {
  constexpr int64_t kAhead = 8;
  const int64_t whole = lines.count / width * width;
  for (int64_t p = 0; p < lines.depth; p += kPair<T>) {
    const T* from = lines.from + p * lines.depth_stride;
    for (int64_t first = 0; first < whole; first += width) {
      if (p + kAhead < lines.depth) __builtin_prefetch(from + kAhead * lines.depth_stride + first);
      float* to = packed + first * steps<T>(lines.depth) + p / kPair<T> * width;
      if (kPair<T> == 2 && width <= kLanes && first + kLanes <= lines.count && p + 2 * kPair<T> <= lines.depth) {
        const Pairs<kLanes> pairs(from + first, from + first + lines.depth_stride);
        std::memcpy(to, &pairs, sizeof(pairs));
      } else {
        for (int64_t i = 0; i < width; ++i) to[i] = packed_of(from + first + i, lines.depth_stride, lines.depth - p);
      }
    }
  }
}

// A panel of lines that each lie in one piece, as far as whole squares go: they are transposed in registers. Where a
// square is wider than the panel, what is written over its edge is written again by the next line, but for the last.
// How many steps along K were taken is returned.
template <int64_t width, class T>
int64_t pack_transposed(const Lines<T>& lines, float* packed) {
  constexpr int64_t squares = (width + kLanes - 1) / kLanes, over = squares * kLanes - width;
  int64_t p = 0;
  if (squares > 1 && over > 0) return p;  // the edge of a line would be written after the next one
  for (; p + kLanes + (over + width - 1) / width <= lines.depth / kPair<T>; p += kLanes) {
    for (int64_t first = 0; first < width; first += kLanes) {
      Vector square[kLanes] = {};
      for (int64_t i = 0; i < kLanes && first + i < width; ++i) {
        const T* from = lines.from + (first + i) * lines.stride + p * kPair<T>;
        square[i] = packed_of(from);
        prefetch(from + width * lines.stride);
      }
      transpose(square);
      for (int64_t i = 0; i < kLanes; ++i) std::memcpy(packed + (p + i) * width + first, &square[i], sizeof(Vector));
    }
  }
  return p;
}

template <int64_t width, class T>
void pack(const Lines<T>& lines, float* packed) {
  int64_t first = 0;
  if (lines.stride == 1) {
    pack_side_by_side<width>(lines, packed);
    first = lines.count / width * width;
  }
  for (; first < lines.count; first += width) {
    const T* from = lines.from + first * lines.stride;
    const int64_t count = std::min(width, lines.count - first);
    float* panel = packed + first * steps<T>(lines.depth);
    int64_t p = 0;
    if (count == width && lines.depth_stride == 1) {
      p = pack_transposed<width>(Lines<T>{from, width, lines.stride, lines.depth, 1}, panel);
    }
    for (; p < steps<T>(lines.depth); ++p) {
      const T* at = from + p * kPair<T> * lines.depth_stride;
      for (int64_t i = 0; i < width; ++i) {
        const int64_t left = lines.depth - p * kPair<T>;
        panel[p * width + i] = i < count ? packed_of(at + i * lines.stride, lines.depth_stride, left) : 0;
      }
    }
  }
}

}  // namespace widenet::WIDENET_LEVEL
