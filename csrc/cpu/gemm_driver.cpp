#include <algorithm>

#include "gemm.h"
#include "parallel.h"

namespace widenet {
namespace {

constexpr int64_t kPieceUnit = 16;          // of K: whole vectors of floats, a divisor of every tile's depth
constexpr int64_t kMostRows = 3072;         // of a, packed at a time
constexpr int64_t kPackedFloats = 1 << 18;  // so much of a, unless one piece of K is more: it stays in cache
constexpr int64_t kGrain = 1 << 14;         // elements that a thread packs at least
constexpr int64_t kLeastWork = 1 << 18;     // products for which a thread is worth waking
constexpr int64_t kLeastTiles = 16;         // of rows, for which a thread packs a b that another packs too
constexpr int64_t kLeastRowShare = 4;       // and no fewer rows than this part of b's columns

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t element_size(DType type) { return type == DType::f32 ? 4 : 2; }

Operand operand_from(const Product& product, const Operand& of, int64_t row, int64_t column) {
  const int64_t offset = (row * of.row_stride + column * of.column_stride) * element_size(product.type);
  return {static_cast<const char*>(of.data) + offset, of.row_stride, of.column_stride};
}

// The length of n nearly equal parts of size, n as small as lets a part be at most `most`; multiples of `unit`.
int64_t even_part(int64_t size, int64_t most, int64_t unit) {
  const int64_t parts = std::max(ceil_div(size, most), int64_t{1});
  return ceil_div(ceil_div(size, parts), unit) * unit;
}

// What is packed of a at a time, rows x depth, a few pieces of K deep; and the floats for the sums of a narrower out,
// unless one piece of K is all of it.
struct Workspace {
  int64_t piece, rows, depth, sums;

  Workspace(const GemmTile& tile, const Product& product)
      : piece(even_part(product.k, product.out_type == DType::bf16 ? tile.bf16_depth : tile.depth, kPieceUnit)),
        rows(even_part(product.m, kMostRows / tile.rows * tile.rows, tile.rows)),
        depth(std::min(std::max(kPackedFloats / std::max(rows * piece, int64_t{1}), int64_t{1}) * piece, product.k)),
        sums(product.out_type == DType::f32 || product.k <= piece ? 0 : std::min(rows, product.m) * product.n) {}
  int64_t packed() const { return rows * depth; }
};

// Every thread a part of out, if there is as much to do, and none with more columns than fit. Where rows can be shared
// out, a thread multiplies what it has packed of a itself, and does not wait for another core's cache.
void cut(GemmArgs& args, const GemmTile& tile) {
  const int64_t threads = std::clamp<int64_t>(args.m * args.n * args.k / kLeastWork, 1, num_threads());
  const int64_t least_rows = std::max(kLeastTiles * tile.rows, args.n / kLeastRowShare);
  args.row_parts = std::clamp<int64_t>(args.m / least_rows, 1, threads);
  while (threads % args.row_parts > 0) --args.row_parts;  // or some would have a part more than others
  // a single tile of rows reads b from memory at every step: it leaves no time in which the next could be fetched
  args.fetch_ahead = args.m > tile.rows && args.m <= tile.few_rows && args.b.column_stride == 1;
  const int64_t least_parts = ceil_div(args.n, args.fetch_ahead ? tile.part_columns / 2 : tile.part_columns);
  const int64_t side_by_side = threads / args.row_parts;
  args.column_parts = std::min(ceil_div(least_parts, side_by_side) * side_by_side, ceil_div(args.n, tile.columns));
  if (args.row_parts * args.column_parts < threads) {  // so narrow is out
    args.row_parts = std::min(ceil_div(threads, args.column_parts), ceil_div(args.m, tile.rows));
  }
}

void multiply_by_dots(const Kernels& kernels, const Product& product) {
  GemmArgs args{};
  args.type = product.type;
  args.m = product.m;
  args.n = product.n;
  args.k = product.k;
  args.a = product.a;
  args.b = product.b;
  args.out = product.out;
  args.out_stride = product.out_stride;
  const int64_t columns = kernels.gemm_tile->dot_columns;
  parallel_for(args.n / columns, ceil_div(kLeastWork, args.m * args.k * columns),
               [&](int64_t begin, int64_t end) { kernels.gemm_dots(args, begin, end); });
}

}  // namespace

bool by_dots(const Kernels& kernels, const Product& product) {
  const bool along_k = product.a.column_stride == 1 && product.b.row_stride == 1;
  if (!along_k || product.accumulate || product.out_type != product.type) return false;
  const GemmTile& tile = *kernels.gemm_tile;
  if (product.n < tile.dot_columns) return false;
  if (product.type == DType::f32) return product.m <= tile.dot_rows;
  return product.type == DType::bf16 && product.m <= tile.bf16_dot_rows;
}

int64_t workspace_size(const Kernels& kernels, const Product& product) {
  if (by_dots(kernels, product)) return 0;
  const Workspace workspace(*kernels.gemm_tile, product);
  return workspace.packed() + workspace.sums;
}

void multiply(const Kernels& kernels, const Product& product, float* workspace) {
  if (by_dots(kernels, product)) return multiply_by_dots(kernels, product);
  const GemmTile& tile = *kernels.gemm_tile;
  const Workspace parts(tile, product);
  const bool narrow = product.out_type != DType::f32;
  GemmArgs args{};
  args.type = product.type;
  args.n = product.n;
  args.piece = parts.piece;
  args.packed_a = workspace;
  args.sums_stride = narrow ? product.n : product.out_stride;
  args.out_stride = product.out_stride;
  for (int64_t row = 0; row < product.m; row += parts.rows) {
    char* out = static_cast<char*>(product.out) + row * product.out_stride * element_size(product.out_type);
    args.m = std::min(parts.rows, product.m - row);
    args.sums = narrow ? workspace + parts.packed() : reinterpret_cast<float*>(out);
    for (int64_t k = 0; k < product.k; k += parts.depth) {
      args.k = std::min(parts.depth, product.k - k);
      args.a = operand_from(product, product.a, row, k);
      args.b = operand_from(product, product.b, k, 0);
      args.accumulate = product.accumulate || k > 0;
      args.out = narrow && k + args.k == product.k ? out : nullptr;
      cut(args, tile);
      parallel_for(ceil_div(args.m, tile.rows), ceil_div(kGrain, args.k * tile.rows),
                   [&](int64_t begin, int64_t end) { kernels.gemm_pack(args, begin, end); });
      parallel_for(args.row_parts * args.column_parts, 1,
                   [&](int64_t begin, int64_t end) { kernels.gemm(args, begin, end); });
    }
  }
}

}  // namespace widenet
