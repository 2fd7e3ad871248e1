#include "mixer.cuh"

template const char* lhcompile::mix<lhcompile::Brain>(const MixerArgs&, void*, void*);
