// The rows of x as they enter a product that another library makes: normalized, and in 8 bits where a scale of each row
// is wanted.
#pragma once

#include "device.cuh"

namespace lhcompile {

constexpr int kNormThreads = 256;

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}
__device__ inline float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

__device__ inline float block_sum(float x) {
  __shared__ float room[kNormThreads / 32];
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (float each : room) x += each;
  return x;
}

__device__ inline float block_max(float x) {
  __shared__ float room[kNormThreads / 32];
  x = warp_max(x);
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  for (float each : room) x = fmaxf(x, each);
  return x;
}

// Row blockIdx.x of x → to, normalized, in vectors of V; where `units` are given, to e4m3 with a scale for the row.
// kHeld: vectors that stay with their thread.
template <typename T, int V, int kHeld>
__global__ void __launch_bounds__(kNormThreads)
    normalize(const __grid_constant__ LinearArgs a, void* to, float* units) {
  constexpr int kStep = kNormThreads * V;
  using Numbers = const float (&)[V];
  release_next();
  const int begin = threadIdx.x * V, width = static_cast<int>(a.width);
  const auto row = static_cast<int64_t>(blockIdx.x) * width;
  const T* x = static_cast<const T*>(a.x) + row;
  await_previous();
  float held[kHeld][V];
#pragma unroll
  for (int n = 0; n < kHeld; n++)
    if (begin + n * kStep < width) load<T, V>(x + begin + n * kStep, held[n]);
  auto all = [&](const auto& work) {
#pragma unroll
    for (int n = 0; n < kHeld; n++)
      if (begin + n * kStep < width) work(begin + n * kStep, held[n]);
    for (int i = begin + kHeld * kStep; i < width; i += kStep) {
      float each[V];
      load<T, V>(x + i, each);
      work(i, each);
    }
  };
  float mean = 0, square = 0, by = 1;
  if (a.norm == Norm::layer) {
    all([&](int, Numbers each) {
#pragma unroll
      for (int j = 0; j < V; j++) mean += each[j];
    });
    mean = block_sum(mean) / width;
  }
  if (a.norm != Norm::none) {
    all([&](int, Numbers each) {
#pragma unroll
      for (int j = 0; j < V; j++) square += (each[j] - mean) * (each[j] - mean);
    });
    by = rsqrtf(block_sum(square) / width + a.epsilon);
  }
  auto normed = [&](int i, Numbers each, float (&result)[V]) {
    float scale[V], shift[V] = {};
#pragma unroll
    for (int j = 0; j < V; j++) scale[j] = 1.0f;
    if (a.norm_scale) load_floats(a.norm_scale + i, scale);
    if (a.norm_bias) load_floats(a.norm_bias + i, shift);
#pragma unroll
    for (int j = 0; j < V; j++) result[j] = (each[j] - mean) * by * scale[j] + shift[j];
  };
  if (!units)
    return all([&](int i, Numbers each) {
      float result[V];
      normed(i, each, result);
      store<T, V>(result, static_cast<T*>(to) + row + i);
    });
  float largest = 0, norm = 0;
  all([&](int i, Numbers each) {
    float result[V];
    normed(i, each, result);
#pragma unroll
    for (int j = 0; j < V; j++) largest = fmaxf(largest, fabsf(result[j])), norm += result[j] * result[j];
  });
  const float unit = fmaxf(block_max(largest), kSmallest) / kLargest;
  if (a.y_unit) norm = block_sum(norm);
  if (threadIdx.x == 0) units[blockIdx.x] = unit;
  if (threadIdx.x == 0 && a.y_unit) a.y_unit[blockIdx.x] = reached(a, norm);
  all([&](int i, Numbers each) {
    float result[V];
    Vector<uint8_t, V> codes;
    normed(i, each, result);
#pragma unroll
    for (int j = 0; j < V; j++) codes.element[j] = to_eight(result[j] / unit);
    put(codes, static_cast<uint8_t*>(to) + row + i);
  });
}

// The same for many rows: each has a warp, which holds its numbers and those of its next row, so no thread waits for
// another warp. The last rows come first: they were written last, and are in the cache yet. Scale and shift lie in
// shared memory in planes: every vector's first four numbers, then its next four. Widths are whole vectors of 16 bytes,
// and no more of them than the threads of a warp hold.
template <typename T, int kHeld>
__global__ void __launch_bounds__(kNormThreads, 2)
    normalize_many(const __grid_constant__ LinearArgs a, void* to, float* units) {
  constexpr int V = 16 / sizeof(T), kRows = kNormThreads / 32, kPlanes = V / 4;
  extern __shared__ float4 constants[];
  const int vectors = static_cast<int>(a.width) / V, lane = threadIdx.x % 32;
  float4 *scale = constants, *shift = constants + kPlanes * vectors;
  release_next();
  for (int i = threadIdx.x; i < kPlanes * vectors; i += kNormThreads) {
    const int place = i % kPlanes * vectors + i / kPlanes;
    scale[place] = a.norm_scale ? reinterpret_cast<const float4*>(a.norm_scale)[i] : float4{1, 1, 1, 1};
    shift[place] = a.norm_bias ? reinterpret_cast<const float4*>(a.norm_bias)[i] : float4{0, 0, 0, 0};
  }
  __syncthreads();
  await_previous();
  Bits<T, V> next[kHeld];
  auto each = [&](const auto& work) {
#pragma unroll
    for (int n = 0; n < kHeld; n++)
      if (n * 32 + lane < vectors) work(n, n * 32 + lane);
  };
  auto read = [&](int64_t row) {
    each([&](int n, int at) { next[n] = fetch_bits<T, V>(static_cast<const T*>(a.x) + row * a.width + at * V); });
  };
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRows;
  int64_t row = a.rows - 1 - (static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / 32);
  if (row >= 0) read(row);
  for (; row >= 0; row -= step) {
    float x[kHeld][V], mean = 0, square = 0, by = 1;
    each([&](int n, int) { widen(numbers<T, V>(next[n]), x[n]); });
    if (row >= step) read(row - step);
    if (a.norm == Norm::layer) {
      each([&](int n, int) {
#pragma unroll
        for (int j = 0; j < V; j++) mean += x[n][j];
      });
      mean = warp_sum(mean) / a.width;
    }
    if (a.norm != Norm::none) {
      each([&](int n, int) {
#pragma unroll
        for (int j = 0; j < V; j++) square += (x[n][j] - mean) * (x[n][j] - mean);
      });
      by = rsqrtf(warp_sum(square) / a.width + a.epsilon);
      each([&](int n, int at) {
#pragma unroll
        for (int plane = 0; plane < kPlanes; plane++) {
          const float4 times = scale[plane * vectors + at], plus = shift[plane * vectors + at];
          float* four = x[n] + 4 * plane;
          four[0] = (four[0] - mean) * by * times.x + plus.x, four[1] = (four[1] - mean) * by * times.y + plus.y;
          four[2] = (four[2] - mean) * by * times.z + plus.z, four[3] = (four[3] - mean) * by * times.w + plus.w;
        }
      });
    }
    if (!units) {
      each([&](int n, int at) { store<T, V>(x[n], static_cast<T*>(to) + row * a.width + at * V); });
      continue;
    }
    float largest = 0, norm = 0;
    each([&](int n, int) {
#pragma unroll
      for (int j = 0; j < V; j++) largest = fmaxf(largest, fabsf(x[n][j])), norm += x[n][j] * x[n][j];
    });
    const float unit = fmaxf(warp_max(largest), kSmallest) / kLargest;
    norm = warp_sum(norm);
    if (lane == 0) units[row] = unit;
    if (lane == 0 && a.y_unit) a.y_unit[row] = reached(a, norm);
    each([&](int n, int at) {
      Vector<uint8_t, V> codes;
#pragma unroll
      for (int j = 0; j < V; j++) codes.element[j] = to_eight(x[n][j] / unit);
      put(codes, static_cast<uint8_t*>(to) + row * a.width + at * V);
    });
  }
}

template <typename T>
const char* launch_normalize(const LinearArgs& a, void* to, float* units, void* stream) {
  constexpr int kCount = 16 / sizeof(T), kHeld = 8;
  constexpr int64_t kManyRows = 2048;
  if (a.rows >= kManyRows && a.width % kCount == 0 && a.width <= 32 * kCount * kHeld) {
    const auto kernel = a.width <= 16 * kCount * kHeld ? normalize_many<T, kHeld / 2> : normalize_many<T, kHeld>;
    const int64_t blocks = (a.rows + kNormThreads / 32 - 1) / (kNormThreads / 32), most = 2 * gpu().processors;
    const dim3 grid(static_cast<unsigned>(blocks < most ? blocks : most));
    return launch(kernel, grid, dim3(kNormThreads), 2 * a.width * sizeof(float), stream, a, to, units);
  }
  auto kernel = a.width > kNormThreads * kCount ? normalize<T, kCount, 4> : normalize<T, kCount, 1>;
  if (a.width % kCount) kernel = normalize<T, 1, 4>;
  return launch(kernel, dim3(static_cast<unsigned>(a.rows)), dim3(kNormThreads), 0, stream, a, to, units);
}

}  // namespace lhcompile
