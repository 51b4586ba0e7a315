// out = a b in float sums, for the experts' products where torch's GEMM is slow (csrc/torch/gemm.cpp says where).
//
// The scheme of Goto and van de Geijn (2008, ACM TOMS 34.3): a lies packed in tiles of kTileRows rows, k by k, so that
// a tile's piece of K, at most kDepth steps, stays in the first-level cache; a block of b, a piece x at most
// kBlockColumns, is packed as the first tile of rows reads it, and stays in the thread's second-level cache; kTileRows
// x kTileColumns sums stay in registers for a piece. 2 M N K flops; a and b are read once and written once as floats,
// out is read and written once for each piece of K. The pieces are the same whatever the threads do, so the bits are
// too.
//
// Where there is an instruction that adds two products of bf16 to a sum (AVX512_BF16), bf16 is packed in pairs, two
// neighbours of K in the place of a float; elsewhere, and fp16, as floats.
#include <algorithm>
#include <utility>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "levels.h"
#include "vector.h"

namespace widenet::WIDENET_LEVEL {
namespace {

using Vector = Lanes<float>::type;
constexpr int64_t kLanes = Lanes<float>::size;
constexpr int64_t kTileColumns = 2 * kLanes;
constexpr int64_t kTileRows = WIDENET_REGISTER_BYTES == 64 ? 12 : 6;  // of 32 or 16 registers, with b and a factor
constexpr int64_t kDepth =
    WIDENET_REGISTER_BYTES == 64 ? 256 : 192;  // of products summed in turn: the error grows with it
constexpr int64_t kBlockColumns = 256;
static_assert(kBlockColumns % kTileColumns == 0);

// How many neighbours of K are packed as one.
template <class T>
constexpr int64_t kPair = 1;
#ifdef __AVX512BF16__
template <>
constexpr int64_t kPair<bfloat16> = 2;
#endif

// For an out of bf16, whose rounding is more than the error of a long sum: then few sums go to memory, or none.
constexpr int64_t kBf16Depth = kPair<bfloat16> == 2 ? 768 : kDepth;

template <class T>
constexpr int64_t steps(int64_t depth) {
  return (depth + kPair<T> - 1) / kPair<T>;
}

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Part i of n nearly equal parts of [0, size), each but the last a multiple of `unit`.
Range part(int64_t i, int64_t n, int64_t size, int64_t unit) {
  const int64_t units = (size + unit - 1) / unit;
  return {std::min(units * i / n * unit, size), std::min(units * (i + 1) / n * unit, size)};
}

// The lanes of a and b in turn, from lane `first` on.
template <int64_t first, class V, size_t... i>
V interleave(V a, V b, std::index_sequence<i...>) {
  return __builtin_shufflevector(a, b, (first + i / 2 + i % 2 * sizeof...(i))...);
}

// n vectors of n lanes become their transpose: log n times every vector is interleaved with its partner half way on.
void transpose(Vector* v) {
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

// Lines side by side, as many as fill panels of `width`, the last with zeros:
// packed[panel][p][i] = from[(panel * width + i) * stride + p * depth_stride], or pairs of them.
template <class T>
struct Lines {
  const T* from;
  int64_t count, stride, depth, depth_stride;
};

// Neighbours in memory are neighbours in a panel: from end to end through memory, which is read ahead of its use.
template <int64_t width, class T>
void pack_side_by_side(const Lines<T>& lines, float* packed) {
  constexpr int64_t kAhead = 8;
  const int64_t whole = lines.count / width * width;
  for (int64_t p = 0; p < lines.depth; p += kPair<T>) {
    const T* from = lines.from + p * lines.depth_stride;
    for (int64_t first = 0; first < whole; first += width) {
      if (p + kAhead < lines.depth) __builtin_prefetch(from + kAhead * lines.depth_stride + first);
      float* to = packed + first * steps<T>(lines.depth) + p / kPair<T> * width;
      for (int64_t i = 0; i < width; ++i) to[i] = packed_of(from + first + i, lines.depth_stride, lines.depth - p);
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

// Where a tile's b comes from, a pair of vectors for each p: packed, or as it lies in memory, packed on the way.
struct Packed {
  const float* panel;
  void read(int64_t p, Vector& b0, Vector& b1) const {
    b0 = load<float>(panel + p * kTileColumns);
    b1 = load<float>(panel + p * kTileColumns + kLanes);
  }
};

template <class T>
struct Unpacked {
  const T* from;
  int64_t stride, depth;
  float* panel;  // or null: no other tile of rows will read it
  void read(int64_t p, Vector& b0, Vector& b1) const {
    const T* row = from + p * kPair<T> * stride;
    for (int64_t q = 0; q < kPair<T>; ++q) {
      for (int64_t i = 0; i < kTileColumns; i += 64 / sizeof(T)) prefetch(row + q * stride + kTileColumns + i);
    }
    if constexpr (kPair<T> == 1) {
      b0 = load<float>(row);
      b1 = load<float>(row + kLanes);
    } else {
      read_pairs(row, stride, p * kPair<T> + 1 < depth, b0, b1);
    }
    if (!panel) return;
    std::memcpy(panel + p * kTileColumns, &b0, sizeof(b0));
    std::memcpy(panel + p * kTileColumns + kLanes, &b1, sizeof(b1));
  }
  static void read_pairs(const T* row, int64_t stride, bool both, Vector& b0, Vector& b1) {
    typedef uint16_t Row __attribute__((vector_size(kTileColumns * sizeof(uint16_t))));
    constexpr std::make_index_sequence<kTileColumns> lanes;
    Row first, second{};
    std::memcpy(&first, row, sizeof(first));
    if (both) std::memcpy(&second, row + stride, sizeof(second));
    b0 = std::bit_cast<Vector>(interleave<0>(first, second, lanes));
    b1 = std::bit_cast<Vector>(interleave<kLanes>(first, second, lanes));
  }
};

// sum + a b, of a packed a in all lanes.
template <class T>
Vector add_product(Vector sum, const float* a, Vector b) {
  if constexpr (kPair<T> == 1) {
    return sum + (*a - Vector{}) * b;
  } else {
#ifdef __AVX512BF16__
    const __m512i pair = _mm512_set1_epi32(std::bit_cast<int32_t>(*a));
    return std::bit_cast<Vector>(
        _mm512_dpbf16_ps(std::bit_cast<__m512>(sum), std::bit_cast<__m512bh>(pair), std::bit_cast<__m512bh>(b)));
#endif
  }
}

template <class T>
void narrow_to(T* out, Vector value) {
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<T, bfloat16>) {
    const auto narrowed = _mm512_cvtneps_pbh(std::bit_cast<__m512>(value));
    std::memcpy(out, &narrowed, sizeof(narrowed));
    return;
  }
#endif
  float values[kLanes];  // in memory, or the loop is not vectorised
  std::memcpy(values, &value, sizeof(value));
  T narrowed[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) narrowed[i] = narrow<T>(values[i]);
  std::memcpy(out, narrowed, sizeof(narrowed));
}

// Where a tile goes: to its float sums or, from the last piece of K, to a narrower out, rows `stride` apart.
template <class T>
struct Place {
  float* sums;
  int64_t sums_stride;
  bool accumulate;  // add to what is in sums
  T* out;           // or null
  int64_t out_stride;

  void put(int64_t row, int64_t column, Vector value) const {
    float* at = sums + row * sums_stride + column;
    if (accumulate) value += load<float>(at);
    if (!out) {
      std::memcpy(at, &value, sizeof(value));
    } else {
      narrow_to(out + row * out_stride + column, value);
    }
  }
  void put(int64_t row, int64_t column, float value) const {
    float& at = sums[row * sums_stride + column];
    if (accumulate) value += at;
    if (!out) {
      at = value;
    } else {
      out[row * out_stride + column] = narrow<T>(value);
    }
  }
};

// A tile of at most most_rows rows: (+)= a b over a packed depth.
template <class T, int64_t most_rows, class B>
__attribute__((noinline)) void multiply(int64_t depth, const float* __restrict a, const B b, const Place<T> place,
                                        int64_t rows) {
  Vector sums[most_rows][2] = {};
  for (int64_t p = 0; p < depth; ++p) {
    Vector b0, b1;
    b.read(p, b0, b1);
#pragma GCC unroll 16
    for (int64_t i = 0; i < most_rows; ++i) {
      sums[i][0] = add_product<T>(sums[i][0], a + p * kTileRows + i, b0);
      sums[i][1] = add_product<T>(sums[i][1], a + p * kTileRows + i, b1);
    }
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < most_rows; ++i) {
    for (int64_t j = 0; j < 2 && i < rows; ++j) place.put(i, j * kLanes, sums[i][j]);
  }
}

// As much of a tile as the rows need, by thirds; but four rows at least: in fewer the sums wait for each other.
template <class T, class B>
void multiply_rows(int64_t depth, const float* a, const B b, const Place<T>& place, int64_t rows) {
  constexpr int64_t third = kTileRows / 3;
  const auto form = rows > 2 * third            ? multiply<T, kTileRows, B>
                    : rows > third || third < 4 ? multiply<T, 2 * third, B>
                                                : multiply<T, third, B>;
  form(depth, a, b, place, rows);
}

// The same for a tile that may have fewer columns too.
template <class T, class B>
void multiply_tile(int64_t depth, const float* a, const B b, const Place<T>& place, int64_t rows, int64_t columns) {
  if (columns >= kTileColumns) return multiply_rows<T>(depth, a, b, place, rows);
  float tile[kTileRows * kTileColumns];
  multiply_rows<T>(depth, a, b, Place<T>{tile, kTileColumns, false, nullptr, 0}, rows);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) place.put(i, j, tile[i * kTileColumns + j]);
  }
}

// A block of out, for a piece of K: the rows' tiles of a, each against all of b. Where a row of b lies in one piece,
// the first tile packs it as it goes; elsewhere it is packed before.
template <class T>
void multiply_block(const GemmArgs& args, Range rows, Range columns, Range piece, const Lines<T>& b, float* packed_b) {
  const int64_t padded = (args.m + kTileRows - 1) / kTileRows * kTileRows, depth = steps<T>(piece.size());
  const float* packed_a = args.packed_a + steps<T>(piece.begin) * padded;
  const bool accumulate = args.accumulate || piece.begin > 0;
  T* out = piece.end == args.k ? static_cast<T*>(args.out) : nullptr;
  const int64_t on_the_way = b.stride == 1 ? columns.size() / kTileColumns * kTileColumns : 0;
  const Lines<T> before{b.from + on_the_way * b.stride, b.count - on_the_way, b.stride, b.depth, b.depth_stride};
  pack<kTileColumns>(before, packed_b + on_the_way * depth);
  for (int64_t i = rows.begin; i < rows.end; i += kTileRows) {
    for (int64_t j = 0; j < columns.size(); j += kTileColumns) {
      const int64_t column = columns.begin + j;
      const Place<T> place{args.sums + i * args.sums_stride + column, args.sums_stride, accumulate,
                           out ? out + i * args.out_stride + column : nullptr, args.out_stride};
      float* panel = packed_b + j * depth;
      const auto tile = [&](auto source) {
        const int64_t height = std::min(kTileRows, rows.end - i), width = columns.size() - j;
        multiply_tile<T>(depth, packed_a + i * depth, source, place, height, width);
      };
      if (i == rows.begin && j < on_the_way) {
        tile(Unpacked<T>{b.from + j, b.depth_stride, piece.size(), rows.size() > kTileRows ? panel : nullptr});
      } else {
        tile(Packed{panel});
      }
    }
  }
}

template <class T>
void multiply_task(const GemmArgs& args, Range rows, Range columns) {
  alignas(64) float packed_b[std::max(kDepth, steps<bfloat16>(kBf16Depth)) * kBlockColumns];  // floats or pairs
  const T* b = static_cast<const T*>(args.b.data) + columns.begin * args.b.column_stride;
  for (Range piece{0, 0}; piece.begin < args.k; piece.begin = piece.end) {
    piece.end = std::min(piece.begin + args.piece, args.k);
    const T* from = b + piece.begin * args.b.row_stride;
    const Lines<T> lines{from, columns.size(), args.b.column_stride, piece.size(), args.b.row_stride};
    multiply_block(args, rows, columns, piece, lines, packed_b);
  }
}

// f(T{}) for the types that are summed in float.
template <class F>
void dispatch_float(DType type, F&& f) {
  dispatch(type, [&](auto t) {
    if constexpr (!std::is_same_v<decltype(t), double>) f(t);
  });
}

}  // namespace

const GemmTile gemm_tile{kTileRows, kTileColumns, kDepth, kBf16Depth, kBlockColumns};

void gemm_pack(const GemmArgs& args, int64_t begin, int64_t end) {
  const int64_t padded = (args.m + kTileRows - 1) / kTileRows * kTileRows;
  dispatch_float(args.type, [&](auto type) {
    using T = decltype(type);
    const auto* a = static_cast<const T*>(args.a.data);
    for (int64_t first = 0; first < args.k; first += args.piece) {
      const int64_t depth = std::min(args.piece, args.k - first);
      const int64_t row = begin * kTileRows, rows = std::min(end * kTileRows, args.m) - row;
      const auto* from = a + row * args.a.row_stride + first * args.a.column_stride;
      const Lines<T> lines{from, rows, args.a.row_stride, depth, args.a.column_stride};
      pack<kTileRows>(lines, args.packed_a + steps<T>(first) * padded + row * steps<T>(depth));
    }
  });
}

void gemm(const GemmArgs& args, int64_t begin, int64_t end) {
  dispatch_float(args.type, [&](auto type) {
    for (int64_t i = begin; i < end; ++i) {
      multiply_task<decltype(type)>(args, part(i / args.column_parts, args.row_parts, args.m, kTileRows),
                                    part(i % args.column_parts, args.column_parts, args.n, kTileColumns));
    }
  });
}

}  // namespace widenet::WIDENET_LEVEL
