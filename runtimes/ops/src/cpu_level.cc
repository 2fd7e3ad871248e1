// The kernels for processors, compiled once for each set of instructions; LEVEL is its name.
#include "cpu.h"
#include "cpu_embedding.h"
#include "cpu_linear.h"
#include "cpu_mixer.h"
#include "cpu_sample.h"

namespace lhcompile::LEVEL {

extern const CpuKernels kernels{mixer_items,    mixer,  linear_items, linear_scratch,
                                linear_prepare, linear, embedding,    sample};

}  // namespace lhcompile::LEVEL
