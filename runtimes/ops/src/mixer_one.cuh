// HyenaMixer and HyenaStep on a GPU, one token: a thread takes one row after the other.
#pragma once

#include "mixer_step.cuh"

namespace lhcompile {

// Blocks of a multiprocessor.
template <int V>
constexpr int kResident = V == 4 ? 2 : 4;

template <typename T, typename C, typename S, int V, int kTaps, bool kPacked, bool kApart>
__global__ void __launch_bounds__(kLanes* kRowsAtOnce, kResident<V>)
    mix_one(const __grid_constant__ MixerArgs a, int rows_each) {
  extern __shared__ float4 memory[];
  float* all = reinterpret_cast<float*>(memory);
  const Rows rows(a);
  const int width = V == 4 ? kLanes * V : blockDim.x * V;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * width, c = first + threadIdx.x * V;
  release_next();
  fill_tables(a, rows, all, width, first);
  __syncthreads();
  await_previous();
  if (c >= a.channels) return;
  using Work = Step<T, C, S, V, kTaps, kPacked, kApart>;
  const Work step(a, rows, all + threadIdx.x * V, width, static_cast<int>(c));
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * rows_each + threadIdx.y;
  const int64_t end = min((blockIdx.y + int64_t{1}) * rows_each, a.batch);
  typename Work::Row now, next;
  if (begin < end) step.read(begin, next);
  for (int64_t row = begin; row < end; row += blockDim.y) {
    now = next;
    if (row + blockDim.y < end) step.read(row + blockDim.y, next);
    step.run(now);
  }
}

}  // namespace lhcompile
