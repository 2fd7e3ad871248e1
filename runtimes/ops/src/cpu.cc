#include "cpu.h"

namespace lhcompile {

namespace base {
extern const CpuKernels kernels;
}
#if defined(__x86_64__)
namespace v3 {
extern const CpuKernels kernels;
}  // namespace v3
namespace v4 {
extern const CpuKernels kernels;
}  // namespace v4
namespace vnni {
extern const CpuKernels kernels;
}  // namespace vnni
#endif

const CpuKernels& cpu_kernels() {
#if defined(__x86_64__)
  const bool v4 = __builtin_cpu_supports("x86-64-v4"), bytes = __builtin_cpu_supports("avx512vnni");
  static const CpuKernels& best = v4 && bytes                           ? vnni::kernels
                                  : v4                                  ? v4::kernels
                                  : __builtin_cpu_supports("x86-64-v3") ? v3::kernels
                                                                        : base::kernels;
  return best;
#else
  return base::kernels;
#endif
}

}  // namespace lhcompile
