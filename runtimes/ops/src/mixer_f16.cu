#include "mixer.cuh"

template const char* lhcompile::mix<lhcompile::Half>(const MixerArgs&, void*, void*);
