// What the GPU kernels share: elements to floats and back in vectors, and launches that overlap with the kernel before.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "args.h"

namespace lhcompile {

using Half = __half;
using Brain = __nv_bfloat16;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(Half x) { return __half2float(x); }
__device__ inline float widen(Brain x) { return __bfloat162float(x); }
__device__ inline void narrow(float x, float* to) { *to = x; }
__device__ inline void narrow(float x, Half* to) { *to = __float2half_rn(x); }
__device__ inline void narrow(float x, Brain* to) { *to = __float2bfloat16_rn(x); }

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T element[N];
};

// Vectors are copied as words, which the compiler does not take apart.
template <int kBytes>
using Word = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint2,
                       std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 2, uint16_t, uint8_t>>>>;

// The bits of N numbers, which can be copied without being taken apart.
template <typename T, int N>
using Bits = Word<sizeof(T) * N>;

template <typename T, int N>
__device__ inline Bits<T, N> fetch_bits(const T* from) {
  return *reinterpret_cast<const Bits<T, N>*>(from);
}
template <typename T, int N>
__device__ inline Vector<T, N> numbers(const Bits<T, N>& bits) {
  Vector<T, N> all;
  memcpy(&all, &bits, sizeof(bits));
  return all;
}
template <typename T, int N>
__device__ inline Vector<T, N> fetch(const T* from) {
  return numbers<T, N>(fetch_bits<T, N>(from));
}
template <typename T, int N>
__device__ inline void put(const Vector<T, N>& all, T* to) {
  Word<sizeof(T) * N> bits;
  memcpy(&bits, &all, sizeof(bits));
  *reinterpret_cast<Word<sizeof(T) * N>*>(to) = bits;
}

// What nobody reads before much else has passed through the cache.
template <typename T, int N>
__device__ inline void put_away(const Vector<T, N>& all, T* to) {
  Word<sizeof(T) * N> bits;
  memcpy(&bits, &all, sizeof(bits));
  __stcs(reinterpret_cast<Word<sizeof(T) * N>*>(to), bits);
}

template <typename T, int N>
__device__ inline void widen(const Vector<T, N>& from, float (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) to[i] = widen(from.element[i]);
}
// 16-bit floats are made in pairs: one instruction for both.
template <typename T, int N>
__device__ inline void narrow(const float (&from)[N], Vector<T, N>* to) {
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      if constexpr (std::is_same_v<T, Half>) {
        reinterpret_cast<__half2*>(to)[i / 2] = __floats2half2_rn(from[i], from[i + 1]);
      } else {
        reinterpret_cast<__nv_bfloat162*>(to)[i / 2] = __floats2bfloat162_rn(from[i], from[i + 1]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) narrow(from[i], &to->element[i]);
  }
}

__device__ inline void fetch_ahead(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// What a state of the type may be: float16 its largest number in place of an infinite one; NaN stays what it is.
template <typename T, int N>
__device__ inline void stop(Vector<T, N>* all) {
  if constexpr (std::is_same_v<T, Half> && N % 2 == 0) {
    const __half2 most = __half2half2(__float2half_rn(65504.0f));
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      auto* both = reinterpret_cast<__half2*>(all->element + i);
      *both = __hmax2_nan(__hmin2_nan(*both, most), __hneg2(most));
    }
  } else if constexpr (std::is_same_v<T, Half>) {
    const Half most = __float2half_rn(65504.0f);
#pragma unroll
    for (int i = 0; i < N; i++) all->element[i] = __hmax_nan(__hmin_nan(all->element[i], most), __hneg(most));
  }
}
template <typename T, int N>
__device__ inline void narrow_state(const float (&from)[N], Vector<T, N>* to) {
  narrow(from, to);
  stop(to);
}

template <typename T, int N>
__device__ inline void load(const T* from, float (&to)[N]) {
  widen(fetch<T, N>(from), to);
}
// Floats at an address that is a multiple of N, or of four, floats.
template <int N>
__device__ inline void load_floats(const float* from, float (&to)[N]) {
  constexpr int kEach = N < 4 ? N : 4;
#pragma unroll
  for (int i = 0; i < N; i += kEach) load<float, kEach>(from + i, *reinterpret_cast<float (*)[kEach]>(to + i));
}
template <typename T, int N>
__device__ inline void store(const float (&from)[N], T* to) {
  Vector<T, N> all;
  narrow(from, &all);
  put(all, to);
}

// An element whose type is known at run time only; for what is not many times read.
__device__ inline float load_any(const void* from, Type type, int64_t place) {
  if (type == Type::f16) return widen(static_cast<const Half*>(from)[place]);
  if (type == Type::bf16) return widen(static_cast<const Brain*>(from)[place]);
  return static_cast<const float*>(from)[place];
}
__device__ inline void store_state(float x, void* to, Type type, int64_t place) {
  const float one[1] = {x};
  if (type == Type::f16) return narrow_state(one, static_cast<Vector<Half, 1>*>(to) + place);
  if (type == Type::bf16) return narrow_state(one, static_cast<Vector<Brain, 1>*>(to) + place);
  static_cast<float*>(to)[place] = x;
}

// float8 e4m3: its largest number, and what a row must reach not to be taken for zero.
constexpr float kLargest = 448.0f, kSmallest = 1e-30f;
__device__ inline uint8_t to_eight(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }
__device__ inline float from_eight(uint8_t bits) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(bits, __NV_E4M3)));
}

// What a 1 means in a row of y that is kept in 8 bits, by the square of the norm of the row that enters.
__device__ inline float reached(const LinearArgs& a, float square) {
  return fmaxf(sqrtf(square) * a.reach[0] + a.reach[1], kSmallest) / kLargest;
}

__device__ inline float activated(Activation kind, float x) {
  if (kind == Activation::gelu) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  if (kind == Activation::gelu_tanh)
    return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
  return x;
}

// A kernel may start while the one before it in the stream still runs. What it reads or writes of that one's data comes
// after `await_previous`; until then it reads constants only, and may ask for other data to come into the cache that
// all share. Every thread of every kernel here calls both.
__device__ inline void release_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ inline void await_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

struct Gpu {
  int processors, shared;  // multiprocessors; bytes of shared memory that a block may have
  int capability;          // 90 is 9.0
};

// Of the current device.
inline const Gpu& gpu() {
  static thread_local Gpu known[64] = {};
  int device = 0;
  cudaGetDevice(&device);
  Gpu& one = known[device & 63];
  if (one.processors == 0) {
    cudaDeviceGetAttribute(&one.processors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&one.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    int minor = 0;
    cudaDeviceGetAttribute(&one.capability, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    one.capability = 10 * one.capability + minor;
  }
  return one;
}

// In clusters of so many blocks, which are neighbours; 0: the kernel has none, or says itself how many.
template <typename... Formal, typename... Given>
const char* launch_clusters(int cluster, void (*kernel)(Formal...), dim3 grid, dim3 block, size_t shared, void* stream,
                            Given&&... given) {
  // Kernels overlap only where they want the same division of a multiprocessor's memory: as much shared as there is.
  const auto* function = reinterpret_cast<const void*>(kernel);
  cudaError_t problem =
      cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (problem == cudaSuccess && shared > 48 * 1024)  // all there is, so that no other launch can lower it
    problem = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, gpu().shared);
  if (problem != cudaSuccess) return cudaGetErrorString(problem);
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  config.attrs = attributes, config.numAttrs = cluster ? 2 : 1;
  problem = cudaLaunchKernelEx(&config, kernel, Formal(given)...);
  return problem == cudaSuccess ? nullptr : cudaGetErrorString(problem);
}

template <typename... Formal, typename... Given>
const char* launch(void (*kernel)(Formal...), dim3 grid, dim3 block, size_t shared, void* stream, Given&&... given) {
  return launch_clusters(0, kernel, grid, block, shared, stream, static_cast<Given&&>(given)...);
}

}  // namespace lhcompile
