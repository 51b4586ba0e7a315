// Small kernels, right and wrong, that show what cuda_emulator.h catches: emulator_examples NAME SEED prints sums.
#include <cstdio>
#include <map>

#include "cuda_emulator.h"

namespace {

constexpr int kThreads = 96, kBlocks = 3;

// Each block adds up its 96 values in shared memory; the arguments leave out what makes it right.
template <bool kBarrier>
__global__ void sum_kernel(const int* values, int* sums) {
  int* partial = shared_memory<int>();
  partial[threadIdx.x] = values[blockIdx.x * kThreads + threadIdx.x];
  if (kBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    unsigned sum = 0;
    for (int i = 0; i < kThreads; ++i) sum += static_cast<unsigned>(partial[i]);
    sums[blockIdx.x] = static_cast<int>(sum);
  }
}

// The same by shuffles, then one atomic addition a warp.
__global__ void shuffle_kernel(const int* values, int* sums) {
  int* total = shared_memory<int>();
  if (threadIdx.x == 0) *total = 0;
  __syncthreads();
  int value = values[blockIdx.x * kThreads + threadIdx.x];
  for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  if (threadIdx.x % 32 == 0) atomicAdd(total, value);
  __syncthreads();
  if (threadIdx.x == 0) sums[blockIdx.x] = *total;
}

// Ranks among equal values by match and ballot: their sum over a block.
__global__ void rank_kernel(const int* values, int* sums) {
  int* total = shared_memory<int>();
  if (threadIdx.x == 0) *total = 0;
  __syncthreads();
  const int value = values[blockIdx.x * kThreads + threadIdx.x] % 5;
  const unsigned before = (1u << threadIdx.x % 32) - 1;
  const int rank = __popc(__match_any_sync(~0u, value) & before), odd = __popc(__ballot_sync(~0u, value % 2));
  atomicAdd(total, rank + (threadIdx.x % 32 == 0 ? odd : 0));
  __syncthreads();
  if (threadIdx.x == 0) sums[blockIdx.x] = *total;
}

// Ends a thread before a barrier that the others wait at.
__global__ void early_exit_kernel(const int*, int* sums) {
  if (blockIdx.x == 1 && threadIdx.x == 70) return;
  __syncthreads();
  if (threadIdx.x == 0) sums[blockIdx.x] = 1;
}

// Half of the threads wait at one barrier, half at another.
__global__ void two_barriers_kernel(const int*, int*) {
  if (threadIdx.x < 48) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

// A warp operation that lane 5 of the second warp never reaches, and one whose mask leaves out the caller.
__global__ void missing_lane_kernel(const int*, int* sums) {
  if (threadIdx.x == 37) return;
  sums[blockIdx.x] = __shfl_sync(~0u, 1, 0);
}
__global__ void wrong_mask_kernel(const int*, int* sums) { sums[blockIdx.x] = __shfl_sync(0xffffu, 1, 0); }
__global__ void absent_source_kernel(const int*, int* sums) {
  if (threadIdx.x < 16) sums[blockIdx.x] = __shfl_sync(0xffffu, 1, 20);
}

// Reads shared memory that nobody wrote; writes past its end; reads past the end of its argument.
__global__ void unwritten_kernel(const int*, int* sums) { sums[blockIdx.x] = shared_memory<int>()[7]; }
__global__ void past_shared_kernel(const int*, int*) { shared_memory<int>()[threadIdx.x + 1] = 1; }
__global__ void past_global_kernel(const int* values, int* sums) {
  sums[blockIdx.x] = values[blockIdx.x * kThreads + threadIdx.x + 1];
}

const std::map<std::string, void (*)(const int*, int*)> kKernels = {{"sum", sum_kernel<true>},
                                                                    {"no_barrier", sum_kernel<false>},
                                                                    {"shuffle", shuffle_kernel},
                                                                    {"rank", rank_kernel},
                                                                    {"early_exit", early_exit_kernel},
                                                                    {"two_barriers", two_barriers_kernel},
                                                                    {"missing_lane", missing_lane_kernel},
                                                                    {"wrong_mask", wrong_mask_kernel},
                                                                    {"absent_source", absent_source_kernel},
                                                                    {"unwritten", unwritten_kernel},
                                                                    {"past_shared", past_shared_kernel},
                                                                    {"past_global", past_global_kernel}};

}  // namespace

int main(int, char** arguments) {
  const std::string name = arguments[1];
  emulator::seed = std::stoull(arguments[2]);
  std::vector<int> values(kBlocks * kThreads), sums(kBlocks, -1);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<int>(i * i % 101);
  try {
    emulator::launch(name.c_str(), kKernels.at(name), {kBlocks}, {kThreads}, kThreads * sizeof(int), values.data(),
                     sums.data());
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
    return 1;
  }
  for (int sum : sums) std::printf("%d ", sum);
  std::puts("");
}
