#include "mixer.cuh"

template const char* lhcompile::mix<float>(const MixerArgs&, void*, void*);
