#include "mixer.cuh"

namespace lhcompile {

extern template const char* mix<float>(const MixerArgs&, void*, void*);
extern template const char* mix<Half>(const MixerArgs&, void*, void*);
extern template const char* mix<Brain>(const MixerArgs&, void*, void*);

size_t mixer_scratch(const MixerArgs& a) {
  if (a.time == 1) return 0;
  return static_cast<size_t>(a.batch * (chunks_of(a).count - 1) * a.order * a.channels) * sizeof(float);
}

const char* mixer_cuda(const MixerArgs& a, void* scratch, void* stream) {
  if (a.signal == Type::f16) return mix<Half>(a, scratch, stream);
  if (a.signal == Type::bf16) return mix<Brain>(a, scratch, stream);
  return mix<float>(a, scratch, stream);
}

}  // namespace lhcompile
