// Picks the kernels for the vector instructions of the CPU at hand.
#include "levels.h"

namespace widenet {

#define WIDENET_TABLE(level)                                                                                        \
  Kernels {                                                                                                         \
    #level, level::gate, level::gate_backward, level::route, level::route_backward_x, level::route_backward_weight, \
        level::permute, level::combine, level::combine_backward, level::activation, level::activation_backward,     \
        level::column_sum, level::reduce_chunks, level::weight_gradient, level::accumulate                          \
  }

const Kernels& kernels() {
  static const Kernels best = [] {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4")) return WIDENET_TABLE(avx512);
    if (__builtin_cpu_supports("x86-64-v3")) return WIDENET_TABLE(avx2);
#endif
    return WIDENET_TABLE(baseline);
  }();
  return best;
}

}  // namespace widenet
