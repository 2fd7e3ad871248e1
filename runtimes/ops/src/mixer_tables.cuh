// What both forms of HyenaMixer on a GPU share: where channels lie, and the tables of a block's channels in shared
// memory.
#pragma once

#include "device.cuh"

namespace lhcompile {

constexpr int kLanes = 32, kRowsAtOnce = 8;

struct Places {
  int64_t block, channels;
  __device__ int64_t operator()(int part, int64_t channel) const {
    return channel / block * 3 * block + part * block + channel % block;
  }
};

// The part that gates the output, and the product of the other two; selections, so that parts stay in registers.
__device__ inline float gate_of(int64_t outer, float x, float y, float z) {
  return outer == 0 ? x : outer == 1 ? y : z;
}
__device__ inline float heard_of(int64_t outer, float x, float y, float z) {
  return (outer == 0 ? y : x) * (outer == 2 ? y : z);
}

// Rows of the tables in shared memory, each as wide as the block has channels.
struct Rows {
  int weight, bias, own, other, readout, direct, index, count;
  __host__ __device__ explicit Rows(const MixerArgs& a) {
    weight = 0;
    bias = static_cast<int>(3 * a.taps);
    own = bias + 3;
    other = own + static_cast<int>(a.order);
    readout = other + static_cast<int>(a.order);
    direct = readout + static_cast<int>(a.order);
    index = direct + 1;
    count = index + (a.index ? static_cast<int>(a.order) : 0);
  }
};

// `width` channels from `first` on; a thread fills one column of them, so the block has a multiple of `width` threads.
__device__ inline void fill_tables(const MixerArgs& a, const Rows& rows, float* tables, int width, int64_t first) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, step = blockDim.x * blockDim.y / width;
  const int64_t c = first + thread % width;
  if (c >= a.channels) return;
  const Places place{a.block, a.channels};
  const int64_t places[3] = {place(0, c), place(1, c), place(2, c)};
  float* column = tables + thread % width;
#pragma unroll
  for (int p = 0; p < 3; p++) {
    for (int64_t k = thread / width; k < a.taps; k += step)
      column[(3 * k + p) * width] = a.weight[k * 3 * a.channels + places[p]];
    if (thread / width == 0) column[(rows.bias + p) * width] = a.bias ? a.bias[places[p]] : 0.0f;
  }
#pragma unroll 4
  for (int n = thread / width; n < a.order; n += step) {
    const int64_t from = n * a.channels + c;
    column[(rows.own + n) * width] = a.own[from];
    column[(rows.other + n) * width] = a.other ? a.other[from] : 0.0f;
    column[(rows.readout + n) * width] = a.readout[from];
    if (a.index) column[(rows.index + n) * width] = __int_as_float(a.index[from]);
  }
  if (thread / width == 0) column[rows.direct * width] = a.direct[c];
}

}  // namespace lhcompile
