// The GPU kernels by themselves, for tests and measurements without onnxruntime: null, or what went wrong.
#include "cuda.h"
#include "products.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED const char* lhcompile_mixer(const lhcompile::MixerArgs* args, void* scratch, void* stream) {
  return lhcompile::mixer_cuda(*args, scratch, stream);
}
EXPORTED size_t lhcompile_mixer_scratch(const lhcompile::MixerArgs* args) { return lhcompile::mixer_scratch(*args); }
EXPORTED const char* lhcompile_linear(const lhcompile::LinearArgs* args, void* scratch, void* stream) {
  return lhcompile::linear_cuda(*args, scratch, stream);
}
EXPORTED size_t lhcompile_linear_scratch(const lhcompile::LinearArgs* args) { return lhcompile::linear_scratch(*args); }
EXPORTED void lhcompile_withhold(int withheld) { lhcompile::is_withheld = withheld != 0; }
EXPORTED const char* lhcompile_embedding(const lhcompile::EmbeddingArgs* args, void* stream) {
  return lhcompile::embedding_cuda(*args, stream);
}
EXPORTED const char* lhcompile_sample(const lhcompile::SampleArgs* args, void* stream) {
  return lhcompile::sample_cuda(*args, stream);
}
