#include "device.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

namespace widenet {
namespace {

#ifdef WIDENET_CUDA
constexpr const char* kArchitectures = WIDENET_CUDA_ARCHITECTURES;  // as CMake writes them, separated by commas
constexpr int kToolkit = WIDENET_CUDA_TOOLKIT;                      // 1000 * major + 10 * minor
#else
constexpr const char* kArchitectures = "";
constexpr int kToolkit = 0;
#endif

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

// The CUDA version that the driver serves; 0 without a driver. Nothing is initialised: a later fork stays possible.
int driver_version() {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  const auto get = driver ? reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDriverGetVersion")) : nullptr;
  int number = 0;
  return get && get(&number) == 0 ? number : 0;
}

// Why the CUDA kernels cannot be used here; empty if they can.
std::string cuda_problem() {
  if (!kToolkit) return "the library was built without CUDA kernels";
  const int driver = driver_version();
  if (!driver) return "there is no NVIDIA driver (libcuda.so.1)";
  if (driver >= kToolkit) return "";
  return "the driver serves CUDA " + version(driver) + ", the kernels were built with " + version(kToolkit) +
         ": update the driver or build with an older nvcc";
}

// Of libtorch_cuda, which a torch for CPUs does not have.
using CurrentStream = AOTITorchError (*)(int32_t, void**);
CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
  const auto found =
      library ? reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  STD_TORCH_CHECK(found, "widenet_kernels: this torch has no aoti_torch_get_current_cuda_stream");
  return found;
}

}  // namespace

bool built_with_cuda() { return kToolkit; }

bool on_gpu(const Tensor& t) { return t.is_cuda(); }

void on_stream(const Tensor& t, const std::function<void(cudaStream_t)>& f) {
  static const CurrentStream current_stream = find_current_stream();
  const int32_t device = t.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(current_stream(device, &stream));
  f(static_cast<cudaStream_t>(stream));
}

}  // namespace widenet

// For Python to read, by ctypes: what was built in, and what it finds here, as JSON.
extern "C" __attribute__((visibility("default"))) const char* widenet_build_info() {
  using namespace widenet;
  static const std::string info = [] {
    const std::pair<const char*, std::string> fields[] = {{"stable_abi", "2.10"},
                                                          {"cpu_level", kernels().level},
                                                          {"cuda_toolkit", kToolkit ? version(kToolkit) : ""},
                                                          {"cuda_architectures", kArchitectures},
                                                          {"cuda_problem", cuda_problem()}};
    std::string text;
    for (const auto& [name, value] : fields) {
      text += (text.empty() ? "{\"" : ", \"") + std::string(name) + "\": \"" + value + "\"";
    }
    return text + "}";
  }();
  return info.c_str();
}
