// out = a b in float sums, for the experts' products where torch's GEMM is slow (csrc/torch/gemm.cpp says where).
//
// The scheme of Goto and van de Geijn (2008, ACM TOMS 34.3): a lies packed in tiles of kTileRows rows, k by k, so that
// a tile's piece of K stays in the first-level cache; a block of b, a piece x at most kBlockColumns, is packed as the
// first tile of rows reads it, and stays in the thread's second-level cache; kTileRows x kTileColumns sums stay in
// registers for a piece. 2 M N K flops; a is read once and written once as floats, b once for each part of the rows,
// out is read and written once for each piece of K. The pieces are the same whatever the threads do, so the bits are
// too.
#include <algorithm>
#include <optional>

#include "levels.h"
#include "pack.h"

namespace widenet::WIDENET_LEVEL {
namespace {

constexpr int64_t kTileColumns = 2 * kLanes;
constexpr int64_t kTileRows = WIDENET_REGISTER_BYTES == 64 ? 12 : 6;  // of 32 or 16 registers, with b and a factor
constexpr int64_t kDepth =
    WIDENET_REGISTER_BYTES == 64 ? 256 : 192;  // of products summed in turn: the error grows with it
constexpr int64_t kBlockColumns = 256;
constexpr int64_t kFewRows = 8 * kTileRows;  // take less time than their b takes to come from memory
static_assert(kBlockColumns % kTileColumns == 0);

// For an out of bf16, whose rounding is more than the error of a long sum: then few sums go to memory, or none.
constexpr int64_t kBf16Depth = WIDENET_REGISTER_BYTES == 64 ? 2 * kPair<bfloat16> * kDepth : kDepth;

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Part i of n nearly equal parts of [0, size), each but the last a multiple of `unit`.
Range part(int64_t i, int64_t n, int64_t size, int64_t unit) {
  const int64_t units = (size + unit - 1) / unit;
  return {std::min(units * i / n * unit, size), std::min(units * (i + 1) / n * unit, size)};
}

// Where a tile's b comes from, a pair of vectors for each p: packed, or as it lies in memory, packed on the way.
struct Packed {
  const float* panel;
  void read(int64_t p, Vector& b0, Vector& b1) const {
    b0 = load<float>(panel + p * kTileColumns);
    b1 = load<float>(panel + p * kTileColumns + kLanes);
  }
};

// What the next block will read of b, fetched in the order of memory, a line at each step of this one.
struct Ahead {
  const char* row = nullptr;
  int64_t row_bytes = 0, stride = 0, rows = 0, at = 0;

  void fetch() {
    if (rows == 0) return;
    prefetch(row + at);
    at += kLine;
    if (at < row_bytes) return;
    at = 0;
    row += stride;
    --rows;
  }
};

struct PackedAndAhead {
  Packed packed;
  Ahead& ahead;
  void read(int64_t p, Vector& b0, Vector& b1) const {
    ahead.fetch();
    packed.read(p, b0, b1);
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
      for (int64_t i = 0; i < kTileColumns; i += kLine / sizeof(T)) prefetch(row + q * stride + kTileColumns + i);
    }
    if constexpr (kPair<T> == 1) {
      b0 = load<float>(row);
      b1 = load<float>(row + kLanes);
    } else {
      const Pairs<kTileColumns> pairs(row, p * kPair<T> + 1 < depth ? row + stride : nullptr);
      b0 = std::bit_cast<Vector>(pairs.low);
      b1 = std::bit_cast<Vector>(pairs.high);
    }
    if (!panel) return;
    std::memcpy(panel + p * kTileColumns, &b0, sizeof(b0));
    std::memcpy(panel + p * kTileColumns + kLanes, &b1, sizeof(b1));
  }
};

// Where a tile goes: to its float sums or, from the last piece of K, to a narrower out, rows `stride` apart.
template <class T>
struct Place {
  float* sums;
  int64_t sums_stride;
  bool accumulate;  // add to what is in sums
  T* out;           // or null
  int64_t out_stride;

  // What will be read or written there, while the sums are made.
  void fetch(int64_t row) const {
    for (int64_t i = 0; i < kTileColumns; i += kLine / sizeof(float)) {
      if (accumulate || !out) __builtin_prefetch(sums + row * sums_stride + i, 1);
    }
    if (out) __builtin_prefetch(out + row * out_stride, 1);
  }
  void put(int64_t row, int64_t column, Vector value) const {
    if (accumulate) value += load<float>(sum(row, column));
    if (out) {
      narrow_to(out + row * out_stride + column, value);
    } else {
      std::memcpy(sum(row, column), &value, sizeof(value));
    }
  }
  void put(int64_t row, int64_t column, float value) const {
    if (accumulate) value += *sum(row, column);
    if (out) {
      out[row * out_stride + column] = narrow<T>(value);
    } else {
      *sum(row, column) = value;
    }
  }

 private:
  float* sum(int64_t row, int64_t column) const { return sums + row * sums_stride + column; }
};

// A tile of at most most_rows rows: (+)= a b over a packed depth. The place is copied here, where its members come from
// the stores that made them: a copy made for the call loads two at once, and waits for all that is stored before.
template <class T, int64_t most_rows, class B>
__attribute__((noinline)) void multiply(int64_t depth, const float* __restrict a, const B b, const Place<T>& target,
                                        int64_t rows) {
  const Place<T> place = target;
  for (int64_t i = 0; i < rows; ++i) place.fetch(i);
  Vector sums[most_rows][2] = {};
  for (int64_t p = 0; p < depth; ++p) {
    Vector b0, b1;
    b.read(p, b0, b1);
#pragma GCC unroll 16
    for (int64_t i = 0; i < most_rows; ++i) {
      sums[i][0] = add_products<T>(sums[i][0], broadcast(a[p * kTileRows + i]), b0);
      sums[i][1] = add_products<T>(sums[i][1], broadcast(a[p * kTileRows + i]), b1);
    }
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < most_rows; ++i) {
    if (i >= rows) break;
    place.put(i, 0, sums[i][0]);
    place.put(i, kLanes, sums[i][1]);
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

// A part of out, for a piece of K.
struct Block {
  int64_t part;
  Range rows, columns, piece;
};

Block first_block(const GemmArgs& args, int64_t i) {
  return {i,
          part(i / args.column_parts, args.row_parts, args.m, kTileRows),
          part(i % args.column_parts, args.column_parts, args.n, kTileColumns),
          {0, std::min(args.piece, args.k)}};
}

// All of K of a part, then the next part, as long as it comes before `end`.
std::optional<Block> next_block(const GemmArgs& args, const Block& block, int64_t end) {
  if (block.piece.end == args.k) {
    return block.part + 1 < end ? std::optional(first_block(args, block.part + 1)) : std::nullopt;
  }
  Block next = block;
  next.piece = {block.piece.end, std::min(block.piece.end + args.piece, args.k)};
  return next;
}

// The block's b, its columns as lines along K.
template <class T>
Lines<T> lines_of(const GemmArgs& args, const Block& block) {
  const T* from = static_cast<const T*>(args.b.data) + block.columns.begin * args.b.column_stride +
                  block.piece.begin * args.b.row_stride;
  return {from, block.columns.size(), args.b.column_stride, block.piece.size(), args.b.row_stride};
}

template <class T>
Ahead ahead_of(const GemmArgs& args, const std::optional<Block>& block) {
  if (!block || !args.fetch_ahead) return {};
  const Lines<T> b = lines_of<T>(args, *block);
  constexpr int64_t size = sizeof(T);
  return {reinterpret_cast<const char*>(b.from), b.count * size, b.depth_stride * size, b.depth};
}

// The rows' tiles of a, each against all of the block's b. Where a row of b lies in one piece, the first tile packs it
// as it goes; elsewhere it is packed before.
template <class T>
void multiply_block(const GemmArgs& args, const Block& block, float* packed_b, Ahead ahead) {
  const auto& [_, rows, columns, piece] = block;
  const Lines<T> b = lines_of<T>(args, block);
  const int64_t padded = (args.m + kTileRows - 1) / kTileRows * kTileRows, depth = steps<T>(piece.size());
  const float* packed_a = args.packed_a + steps<T>(piece.begin) * padded;
  const bool accumulate = args.accumulate || piece.begin > 0;
  T* out = piece.end == args.k ? static_cast<T*>(args.out) : nullptr;
  const int64_t on_the_way = b.stride == 1 ? b.count / kTileColumns * kTileColumns : 0;
  const Lines<T> before{b.from + on_the_way * b.stride, b.count - on_the_way, b.stride, b.depth, b.depth_stride};
  pack<kTileColumns>(before, packed_b + on_the_way * depth);
  for (int64_t i = rows.begin; i < rows.end; i += kTileRows) {
    for (int64_t j = 0; j < b.count; j += kTileColumns) {
      const int64_t column = columns.begin + j;
      const Place<T> place{args.sums + i * args.sums_stride + column, args.sums_stride, accumulate,
                           out ? out + i * args.out_stride + column : nullptr, args.out_stride};
      float* panel = packed_b + j * depth;
      const auto tile = [&](const auto& source) {
        multiply_tile<T>(depth, packed_a + i * depth, source, place, std::min(kTileRows, rows.end - i), b.count - j);
      };
      if (i == rows.begin && j < on_the_way) {
        tile(Unpacked<T>{b.from + j, b.depth_stride, b.depth, rows.size() > kTileRows ? panel : nullptr});
      } else if (ahead.rows > 0) {
        tile(PackedAndAhead{panel, ahead});
      } else {
        tile(Packed{panel});
      }
    }
  }
}

template <class T>
void multiply_parts(const GemmArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t depth = std::is_same_v<T, bfloat16> ? steps<T>(kBf16Depth) : kDepth;
  alignas(64) float packed_b[depth * kBlockColumns];  // 256 KiB with AVX-512, of bf16 512
  for (std::optional<Block> block = first_block(args, begin), next; block; block = next) {
    next = next_block(args, *block, end);
    multiply_block<T>(args, *block, packed_b, ahead_of<T>(args, next));
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

const GemmTile gemm_tile{kTileRows, kTileColumns, kDepth,   kPair<bfloat16> == 2, kBf16Depth, kBlockColumns,
                         kFewRows,  kDotColumns,  kDotRows, kBf16DotRows};

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
    if (begin < end) multiply_parts<decltype(type)>(args, begin, end);
  });
}

}  // namespace widenet::WIDENET_LEVEL
