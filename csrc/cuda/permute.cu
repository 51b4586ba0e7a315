// permute: rows[r] = x[token of row r], zero where unused. R D elements read and written; bits are moved, not rounded.
//
// One warp a row, 16 bytes a lane where rows are that wide and aligned.
#include "device.h"
#include "kernels.h"

namespace widenet::cuda {
namespace {

template <class Piece>
__global__ void __launch_bounds__(kThreads) permute_kernel(PermuteArgs args, int64_t num_rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (row >= num_rows) return;
  const int64_t choice = args.row_choice[row], pieces = args.row_bytes / static_cast<int64_t>(sizeof(Piece));
  const bool used = choice >= 0 && choice < args.num_tokens * args.k;
  const Piece* in = static_cast<const Piece*>(args.x) + (used ? token_of(choice, args.k) : 0) * pieces;
  Piece* out = static_cast<Piece*>(args.rows) + row * pieces;
#pragma unroll 4
  for (int64_t i = threadIdx.x % kLanes; i < pieces; i += kLanes) out[i] = used ? in[i] : Piece{};
}

template <class Piece>
bool fits(const PermuteArgs& args) {
  return is_aligned<sizeof(Piece)>(args.x, args.rows, args.row_bytes);
}

}  // namespace

void permute(const PermuteArgs& args, int64_t num_rows, cudaStream_t stream) {
  const auto kernel = fits<Pack<uint32_t, 4>>(args) ? permute_kernel<Pack<uint32_t, 4>>
                      : fits<uint32_t>(args)        ? permute_kernel<uint32_t>
                      : fits<uint16_t>(args)        ? permute_kernel<uint16_t>
                                                    : permute_kernel<uint8_t>;
  launch("permute", kernel, divide_up(num_rows, kWarps), 0, stream, args, num_rows);
}

}  // namespace widenet::cuda
