// out = a b in float sums, for the experts' products where torch's GEMM is slow (csrc/torch/gemm.cpp says where).
//
// The scheme of Goto and van de Geijn (2008, ACM TOMS 34.3): a lies packed in tiles of kTileRows rows, k by k, so that
// a tile's piece of K, at most kDepth, stays in the first-level cache; a block of b, a piece x at most kBlockColumns,
// is packed as the first tile of rows reads it, and stays in the thread's second-level cache; kTileRows x kTileColumns
// sums stay in registers for a piece. 2 M N K flops; a and b are read once and written once as floats, out is read and
// written once for each piece of K. The pieces are the same whatever the threads do, so the bits are too.
#include <algorithm>
#include <utility>

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
template <int64_t first, size_t... i>
Vector interleave(Vector a, Vector b, std::index_sequence<i...>) {
  return __builtin_shufflevector(a, b, (first + i / 2 + i % 2 * kLanes)...);
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

// Lines side by side, as many as fill panels of `width`, the last with zeros:
// packed[panel][p][i] = from[(panel * width + i) * stride + p * depth_stride].
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
  for (int64_t p = 0; p < lines.depth; ++p) {
    const T* from = lines.from + p * lines.depth_stride;
    for (int64_t first = 0; first < whole; first += width) {
      if (p + kAhead < lines.depth) __builtin_prefetch(from + kAhead * lines.depth_stride + first);
      float* to = packed + first * lines.depth + p * width;
      for (int64_t i = 0; i < width; ++i) to[i] = widen(from[first + i]);
    }
  }
}

// A panel of lines that each lie in one piece, as far as whole squares go: they are transposed in registers. Where a
// square is wider than the panel, what is written over its edge is written again by the next line, but for the last.
template <int64_t width, class T>
int64_t pack_transposed(const Lines<T>& lines, float* packed) {
  constexpr int64_t squares = (width + kLanes - 1) / kLanes, over = squares * kLanes - width;
  int64_t p = 0;
  if (squares > 1 && over > 0) return p;  // the edge of a line would be written after the next one
  for (; p + kLanes + (over + width - 1) / width <= lines.depth; p += kLanes) {
    for (int64_t first = 0; first < width; first += kLanes) {
      Vector square[kLanes] = {};
      for (int64_t i = 0; i < kLanes && first + i < width; ++i) {
        const T* from = lines.from + (first + i) * lines.stride + p;
        square[i] = load<float>(from);
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
    float* panel = packed + first * lines.depth;
    int64_t p = 0;
    if (count == width && lines.depth_stride == 1) {
      p = pack_transposed<width>(Lines<T>{from, width, lines.stride, lines.depth, 1}, panel);
    }
    for (; p < lines.depth; ++p) {
      for (int64_t i = 0; i < width; ++i) {
        panel[p * width + i] = i < count ? widen(from[i * lines.stride + p * lines.depth_stride]) : 0;
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
  int64_t stride;
  float* panel;  // or null: no other tile of rows will read it
  void read(int64_t p, Vector& b0, Vector& b1) const {
    const T* row = from + p * stride;
    for (int64_t i = 0; i < kTileColumns; i += 64 / sizeof(T)) prefetch(row + kTileColumns + i);
    b0 = load<float>(row);
    b1 = load<float>(row + kLanes);
    if (!panel) return;
    std::memcpy(panel + p * kTileColumns, &b0, sizeof(b0));
    std::memcpy(panel + p * kTileColumns + kLanes, &b1, sizeof(b1));
  }
};

// A tile of out of at most most_rows rows, `stride` apart: (+)= a b over `depth`.
template <int64_t most_rows, class B>
__attribute__((noinline)) void multiply(int64_t depth, const float* __restrict a, const B b, float* __restrict out,
                                        int64_t stride, bool accumulate, int64_t rows) {
  Vector sums[most_rows][2] = {};
  for (int64_t p = 0; p < depth; ++p) {
    Vector b0, b1;
    b.read(p, b0, b1);
#pragma GCC unroll 16
    for (int64_t i = 0; i < most_rows; ++i) {
      const Vector factor = a[p * kTileRows + i] - Vector{};  // in all lanes
      sums[i][0] += factor * b0;
      sums[i][1] += factor * b1;
    }
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < most_rows; ++i) {
    for (int64_t j = 0; j < 2 && i < rows; ++j) {
      float* place = out + i * stride + j * kLanes;
      const Vector result = accumulate ? load<float>(place) + sums[i][j] : sums[i][j];
      std::memcpy(place, &result, sizeof(result));
    }
  }
}

// As much of a tile as the rows need, by thirds; but four rows at least: in fewer the sums wait for each other.
template <class B>
void multiply_rows(int64_t depth, const float* a, const B b, float* out, int64_t stride, bool accumulate,
                   int64_t rows) {
  constexpr int64_t third = kTileRows / 3;
  const auto form = rows > 2 * third            ? multiply<kTileRows, B>
                    : rows > third || third < 4 ? multiply<2 * third, B>
                                                : multiply<third, B>;
  form(depth, a, b, out, stride, accumulate, rows);
}

// The same for a tile that may have fewer columns too.
template <class B>
void multiply_tile(int64_t depth, const float* a, const B b, float* out, int64_t stride, bool accumulate, int64_t rows,
                   int64_t columns) {
  if (columns >= kTileColumns) return multiply_rows(depth, a, b, out, stride, accumulate, rows);
  float tile[kTileRows * kTileColumns];
  multiply_rows(depth, a, b, tile, kTileColumns, false, rows);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      float& place = out[i * stride + j];
      place = accumulate ? place + tile[i * kTileColumns + j] : tile[i * kTileColumns + j];
    }
  }
}

// A block of out, for a piece of K: the rows' tiles of a, each against all of b. Where a row of b lies in one piece,
// the first tile packs it as it goes; elsewhere it is packed before.
template <class T>
void multiply_block(const GemmArgs& args, Range rows, Range columns, Range piece, const Lines<T>& b, float* packed_b) {
  const int64_t padded = (args.m + kTileRows - 1) / kTileRows * kTileRows, depth = piece.size();
  const float* packed_a = args.packed_a + piece.begin * padded;
  const bool accumulate = args.accumulate || piece.begin > 0;
  const int64_t on_the_way = b.stride == 1 ? columns.size() / kTileColumns * kTileColumns : 0;
  const Lines<T> before{b.from + on_the_way * b.stride, b.count - on_the_way, b.stride, b.depth, b.depth_stride};
  pack<kTileColumns>(before, packed_b + on_the_way * depth);
  for (int64_t i = rows.begin; i < rows.end; i += kTileRows) {
    for (int64_t j = 0; j < columns.size(); j += kTileColumns) {
      float *panel = packed_b + j * depth, *out = args.sums + i * args.sums_stride + columns.begin + j;
      const auto tile = [&](auto source) {
        multiply_tile(depth, packed_a + i * depth, source, out, args.sums_stride, accumulate,
                      std::min(kTileRows, rows.end - i), columns.size() - j);
      };
      if (i == rows.begin && j < on_the_way) {
        tile(Unpacked<T>{b.from + j, b.depth_stride, rows.size() > kTileRows ? panel : nullptr});
      } else {
        tile(Packed{panel});
      }
    }
  }
}

template <class T>
void multiply_task(const GemmArgs& args, Range rows, Range columns) {
  alignas(64) float packed_b[kDepth * kBlockColumns];
  const T* b = static_cast<const T*>(args.b.data) + columns.begin * args.b.column_stride;
  for (Range piece{0, 0}; piece.begin < args.k; piece.begin = piece.end) {
    piece.end = std::min(piece.begin + args.piece, args.k);
    const T* from = b + piece.begin * args.b.row_stride;
    const Lines<T> lines{from, columns.size(), args.b.column_stride, piece.size(), args.b.row_stride};
    multiply_block(args, rows, columns, piece, lines, packed_b);
  }
  if (!args.out) return;
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const float* sums = args.sums + i * args.sums_stride;
    T* out = static_cast<T*>(args.out) + i * args.out_stride;
    for (int64_t j = columns.begin; j < columns.end; ++j) out[j] = narrow<T>(sums[j]);
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

const GemmTile gemm_tile{kTileRows, kTileColumns, kDepth, kBlockColumns};

void gemm_pack(const GemmArgs& args, int64_t begin, int64_t end) {
  const int64_t padded = (args.m + kTileRows - 1) / kTileRows * kTileRows;
  dispatch_float(args.type, [&](auto type) {
    const auto* a = static_cast<const decltype(type)*>(args.a.data);
    for (int64_t first = 0; first < args.k; first += args.piece) {
      const int64_t depth = std::min(args.piece, args.k - first);
      const int64_t row = begin * kTileRows, rows = std::min(end * kTileRows, args.m) - row;
      const auto* from = a + row * args.a.row_stride + first * args.a.column_stride;
      const Lines<decltype(type)> lines{from, rows, args.a.row_stride, depth, args.a.column_stride};
      pack<kTileRows>(lines, args.packed_a + first * padded + row * depth);
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
