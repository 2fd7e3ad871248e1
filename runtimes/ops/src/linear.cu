// Linear on a GPU: a few rows by gemv.cuh; more by cuBLASLt, with a kernel for the norm before it, and one after it for
// what cuBLASLt cannot add itself.
#include "cublaslt.h"
#include "cuda.h"
#include "gemv.cuh"

namespace lhcompile {
namespace {

constexpr int kThreads = 256;

__device__ float block_sum(float x) {
  __shared__ float room[kThreads / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  __syncthreads();
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (float each : room) x += each;
  return x;
}

__device__ float block_max(float x) {
  __shared__ float room[kThreads / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  for (float each : room) x = fmaxf(x, each);
  return x;
}

// Row blockIdx.x of x → to, normalized, in vectors of V; where `units` are given, to e4m3 with a scale for the row.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) normalize(const __grid_constant__ LinearArgs a, void* to, float* units) {
  constexpr int kStep = kThreads * V;
  release_next();
  await_previous();
  const T* x = static_cast<const T*>(a.x) + blockIdx.x * a.width;
  const int begin = threadIdx.x * V, width = static_cast<int>(a.width);
  float mean = 0, square = 0, by = 1;
  if (a.norm == Norm::layer) {
    for (int i = begin; i < width; i += kStep) {
      float each[V];
      load<T, V>(x + i, each);
#pragma unroll
      for (int j = 0; j < V; j++) mean += each[j];
    }
    mean = block_sum(mean) / width;
  }
  if (a.norm != Norm::none) {
    for (int i = begin; i < width; i += kStep) {
      float each[V];
      load<T, V>(x + i, each);
#pragma unroll
      for (int j = 0; j < V; j++) square += (each[j] - mean) * (each[j] - mean);
    }
    by = rsqrtf(block_sum(square) / width + a.epsilon);
  }
  auto normed = [&](int i, float (&each)[V]) {
    load<T, V>(x + i, each);
    if (a.norm == Norm::none) return;
    float scale[V], shift[V] = {};
    load<float, V>(a.norm_scale + i, scale);
    if (a.norm_bias) load<float, V>(a.norm_bias + i, shift);
#pragma unroll
    for (int j = 0; j < V; j++) each[j] = (each[j] - mean) * by * scale[j] + shift[j];
  };
  if (!units) {
    for (int i = begin; i < width; i += kStep) {
      float each[V];
      normed(i, each);
      store<T, V>(each, static_cast<T*>(to) + blockIdx.x * a.width + i);
    }
    return;
  }
  float largest = 0;
  for (int i = begin; i < width; i += kStep) {
    float each[V];
    normed(i, each);
#pragma unroll
    for (int j = 0; j < V; j++) largest = fmaxf(largest, fabsf(each[j]));
  }
  const float unit = fmaxf(block_max(largest), kSmallest) / kLargest;
  if (threadIdx.x == 0) units[blockIdx.x] = unit;
  for (int i = begin; i < width; i += kStep) {
    float each[V];
    Vector<uint8_t, V> codes;
    normed(i, each);
#pragma unroll
    for (int j = 0; j < V; j++) codes.element[j] = to_eight(each[j] / unit);
    put(codes, static_cast<uint8_t*>(to) + blockIdx.x * a.width + i);
  }
}

// y = residual + activation(y + bias)
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) finish(const __grid_constant__ LinearArgs a) {
  release_next();
  await_previous();
  const int64_t place = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (place >= a.rows * a.out) return;
  T* y = static_cast<T*>(a.y) + place;
  float each[V], carried[V] = {};
  load<T, V>(y, each);
  if (a.residual) load<T, V>(static_cast<const T*>(a.residual) + place, carried);
#pragma unroll
  for (int j = 0; j < V; j++) {
    if (a.bias) each[j] += load_any(a.bias, a.bias_type, place % a.out + j);
    each[j] = activated(a.activation, each[j]) + carried[j];
  }
  store<T, V>(each, y);
}

// In scratch memory: x as it enters the product, and behind it the scales of its rows.
size_t entering(const LinearArgs& a) {
  const bool eight = a.weight_type == Type::e4m3;
  if (a.norm == Norm::none && !eight) return 0;
  return static_cast<size_t>(a.rows * a.width * (eight ? 1 : size_of(a.signal)) + 15) / 16 * 16;
}

template <typename T>
const char* many_rows(const LinearArgs& a, void* scratch, void* stream) {
  constexpr int kFew = 8 / sizeof(T);  // elements of eight bytes
  const bool eight = a.weight_type == Type::e4m3;
  const void* x = a.x;
  auto* units = eight ? reinterpret_cast<float*>(static_cast<char*>(scratch) + entering(a)) : nullptr;
  if (entering(a)) {
    const auto kernel = a.width % kFew ? normalize<T, 1> : normalize<T, kFew>;
    const dim3 grid(static_cast<unsigned>(a.rows));
    if (const char* problem = launch(kernel, grid, dim3(kThreads), 0, stream, a, scratch, units)) return problem;
    x = scratch;
  }
  Product p{};
  p.rows = a.rows, p.width = a.width, p.out = a.out, p.type = a.signal, p.inputs = a.weight_type;
  p.x = x, p.weight = a.weight, p.y = a.y;
  if (eight) p.x_scale = units, p.weight_scale = static_cast<const float*>(a.weight_scale);
  LinearArgs rest = a;
  if (!a.bias || (a.bias_type == a.signal && !(eight && a.signal == Type::f32))) {  // the product adds it, perhaps more
    p.bias = a.bias, rest.bias = nullptr;
    if (a.activation == Activation::gelu_tanh) p.gelu_tanh = true, rest.activation = Activation::none;
    if (a.activation == Activation::none) p.residual = a.residual, rest.residual = nullptr;
  }
  if (const char* problem = multiply(p, stream)) return problem;
  if (!rest.bias && !rest.residual && rest.activation == Activation::none) return nullptr;
  const auto kernel = a.out % kFew ? finish<T, 1> : finish<T, kFew>;
  const int64_t each = kThreads * (a.out % kFew ? 1 : kFew);
  const dim3 grid(static_cast<unsigned>((a.rows * a.out + each - 1) / each));
  return launch(kernel, grid, dim3(kThreads), 0, stream, rest);
}

template <typename W, typename T>
const char* few_or_many(const LinearArgs& a, void* scratch, void* stream) {
  return gemv_serves<W, T>(a) ? launch_gemv<W, T>(a, stream) : many_rows<T>(a, scratch, stream);
}

template <typename T>
const char* linear(const LinearArgs& a, void* scratch, void* stream) {
  if (a.weight_type == Type::e4m3) return few_or_many<Eight, T>(a, scratch, stream);
  return few_or_many<Plain<T>, T>(a, scratch, stream);
}

}  // namespace

size_t linear_scratch(const LinearArgs& a) {
  return entering(a) + (a.weight_type == Type::e4m3 ? static_cast<size_t>(a.rows) * sizeof(float) : 0);
}

const char* linear_cuda(const LinearArgs& a, void* scratch, void* stream) {
  if (a.signal == Type::f16) return linear<Half>(a, scratch, stream);
  if (a.signal == Type::bf16) return linear<Brain>(a, scratch, stream);
  return linear<float>(a, scratch, stream);
}

}  // namespace lhcompile
