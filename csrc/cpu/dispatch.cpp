// Picks the kernels for the vector instructions of the CPU at hand.
#include "levels.h"

namespace widenet {

#define WIDENET_TABLE(level, of_gemm)                                                                                 \
  Kernels {                                                                                                           \
    #of_gemm, level::gate, level::gate_backward, level::route, level::route_backward_x, level::route_backward_weight, \
        level::permute, level::combine, level::combine_backward, level::activation, level::activation_backward,       \
        level::column_sum, level::reduce_chunks, level::weight_gradient, level::accumulate, of_gemm::gemm_pack,       \
        of_gemm::gemm, of_gemm::gemm_dots, &of_gemm::gemm_tile                                                        \
  }

std::span<const Kernels> supported_kernels() {
#if defined(__x86_64__)
  // Each level includes the ones behind it, so what a CPU can run is the rest of the table from some entry on.
  static constexpr Kernels table[] = {WIDENET_TABLE(avx512, avx512_bf16), WIDENET_TABLE(avx512, avx512),
                                      WIDENET_TABLE(avx2, avx2), WIDENET_TABLE(baseline, baseline)};
  static const int best = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4")) return __builtin_cpu_supports("avx512bf16") ? 0 : 1;
    return __builtin_cpu_supports("x86-64-v3") ? 2 : 3;
  }();
  return std::span(table).subspan(best);
#else
  static constexpr Kernels table[] = {WIDENET_TABLE(baseline, baseline)};
  return table;
#endif
}

// Intel's CPUs multiply pairs of bf16 half as fast as floats: 82 GFLOP/s a core, not 170, were measured.
const Kernels& kernels() {
  static const Kernels& best = supported_kernels()[is_intel() && supported_kernels().front().gemm_tile->pairs ? 1 : 0];
  return best;
}

bool is_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

bool has_tiles() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("amx-bf16");
#else
  return false;
#endif
}

}  // namespace widenet
