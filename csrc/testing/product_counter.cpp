// Preloaded into a process, it stands between _C.so and torch's products and counts them: tests/test_products.py.
#include <dlfcn.h>

#include <cstdint>

namespace {

int64_t products = 0;

template <class... Args>
int32_t counted(const char* name, Args... args) {
  static void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  ++products;
  return reinterpret_cast<int32_t (*)(Args...)>(dlsym(torch, name))(args...);
}

}  // namespace

extern "C" {

int64_t widenet_products() { return products; }

int32_t aoti_torch_cpu_mm_out(void* out, void* a, void* b) { return counted("aoti_torch_cpu_mm_out", out, a, b); }

int32_t aoti_torch_cpu_addmm_out(void* out, void* self, void* a, void* b, double beta, double alpha) {
  return counted("aoti_torch_cpu_addmm_out", out, self, a, b, beta, alpha);
}
}
