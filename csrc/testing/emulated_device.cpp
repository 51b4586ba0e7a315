// The device of csrc/torch for the emulator: every tensor counts as one on a GPU, whose kernels run here and now.
#include "../torch/device.h"

namespace widenet {

bool on_gpu(const Tensor&) { return true; }

void on_stream(const Tensor&, const std::function<void(cudaStream_t)>& f) { f(nullptr); }

bool built_with_cuda() { return false; }  // the ops are registered for CPU tensors

}  // namespace widenet
