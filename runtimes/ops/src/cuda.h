// The kernels for GPUs. They are asynchronous on `stream` and can be captured in a graph after a first run with the
// same sizes. They return null, or what went wrong.
#pragma once

#include <cstddef>

#include "args.h"

namespace lhcompile {

// Bytes of device memory that a call needs for itself.
size_t mixer_scratch(const MixerArgs&);
size_t linear_scratch(const LinearArgs&);

const char* mixer_cuda(const MixerArgs&, void* scratch, void* stream);
const char* linear_cuda(const LinearArgs&, void* scratch, void* stream);
const char* embedding_cuda(const EmbeddingArgs&, void* stream);
const char* sample_cuda(const SampleArgs&, void* stream);

}  // namespace lhcompile
