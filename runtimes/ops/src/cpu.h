// The kernels for processors. Each does a range of its items, so that any number of threads can share a call.
#pragma once

#include "args.h"

namespace lhcompile {

struct CpuKernels {
  int64_t (*mixer_items)(const MixerArgs&);
  void (*mixer)(const MixerArgs&, int64_t first, int64_t last);
  int64_t (*linear_items)(const LinearArgs&);
  int64_t (*linear_scratch)(const LinearArgs&);  // bytes, filled by linear_prepare
  void (*linear_prepare)(const LinearArgs&, void* scratch, int64_t first_row, int64_t last_row);
  void (*linear)(const LinearArgs&, const void* scratch, int64_t first, int64_t last);
  void (*embedding)(const EmbeddingArgs&, int64_t first, int64_t last);
  void (*sample)(const SampleArgs&, int64_t first, int64_t last);
};

// Those for the best instructions this processor has.
const CpuKernels& cpu_kernels();

}  // namespace lhcompile
