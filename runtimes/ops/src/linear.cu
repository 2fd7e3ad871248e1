// Linear on a GPU: a few rows of 16 bits by gemv.cuh and few_rows.cuh; others by cuBLASLt, with a kernel for the norm
// before it, one that makes numbers of 4-bit codes, and one after it for what cuBLASLt cannot add itself.
#include "cublaslt.h"
#include "cuda.h"
#include "eight.h"
#include "few_rows.cuh"
#include "gemv.cuh"

namespace lhcompile {
namespace {

constexpr int kThreads = 256;

__device__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}
__device__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

__device__ float block_sum(float x) {
  __shared__ float room[kThreads / 32];
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (float each : room) x += each;
  return x;
}

__device__ float block_max(float x) {
  __shared__ float room[kThreads / 32];
  x = warp_max(x);
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  for (float each : room) x = fmaxf(x, each);
  return x;
}

// Row blockIdx.x of x → to, normalized, in vectors of V; where `units` are given, to e4m3 with a scale for the row.
// kHeld: vectors that stay with their thread.
template <typename T, int V, int kHeld>
__global__ void __launch_bounds__(kThreads) normalize(const __grid_constant__ LinearArgs a, void* to, float* units) {
  constexpr int kStep = kThreads * V;
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

constexpr int64_t kManyRows = 2048;
constexpr int kMostHeld = 8;  // vectors of a thread

// The same for many rows: each has a warp, which holds its numbers and those of its next row, so no thread waits for
// another warp. The last rows come first: they were written last, and are in the cache yet. Scale and shift lie in shared memory in planes: every vector's first four numbers, then its next four.
template <typename T, int kHeld>
__global__ void __launch_bounds__(kThreads, 2)
    normalize_many(const __grid_constant__ LinearArgs a, void* to, float* units) {
  constexpr int V = 16 / sizeof(T), kRows = kThreads / 32, kPlanes = V / 4;
  extern __shared__ float4 constants[];
  const int vectors = static_cast<int>(a.width) / V, lane = threadIdx.x % 32;
  float4 *scale = constants, *shift = constants + kPlanes * vectors;
  release_next();
  for (int i = threadIdx.x; i < kPlanes * vectors; i += kThreads) {
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

// y = residual + activation(product + bias), in codes where they are wanted
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) finish(const __grid_constant__ LinearArgs a, const T* product) {
  release_next();
  await_previous();
  const int64_t place = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (place >= a.rows * a.out) return;
  float each[V], carried[V] = {};
  load<T, V>(product + place, each);
  if (a.residual) load<T, V>(static_cast<const T*>(a.residual) + place, carried);
#pragma unroll
  for (int j = 0; j < V; j++) {
    if (a.bias) each[j] += load_any(a.bias, a.bias_type, place % a.out + j);
    each[j] = activated(a.activation, each[j]) + carried[j];
  }
  if (!a.y_unit) return store<T, V>(each, static_cast<T*>(a.y) + place);
  Vector<uint8_t, V> codes;
#pragma unroll
  for (int j = 0; j < V; j++) codes.element[j] = to_eight(each[j] / a.y_unit[place / a.out]);
  put(codes, static_cast<uint8_t*>(a.y) + place);
}

// The weight of 4-bit codes, [out, width]: a thread has sixteen bytes of codes, which share a scale.
template <typename T>
__global__ void __launch_bounds__(kThreads) expand(const __grid_constant__ LinearArgs a, void* to) {
  release_next();
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool there = block < a.out * (a.width / 32);
  const auto* codes = static_cast<const uint8_t*>(a.weight) + block * 16;
  const float scale = there ? widen(static_cast<const Half*>(a.weight_scale)[block]) : 0.0f;
  const Vector<uint8_t, 16> bytes = there ? fetch<uint8_t, 16>(codes) : Vector<uint8_t, 16>{};
  await_previous();  // which may still read what is written here
  if (!there) return;
#pragma unroll
  for (int i = 0; i < 16; i += 2) {
    float four[4];
#pragma unroll
    for (int j = 0; j < 4; j++) four[j] = scale * static_cast<float>((bytes.element[i + j / 2] >> j % 2 * 4 & 15) - 8);
    store<T, 4>(four, static_cast<T*>(to) + block * 32 + 2 * i);
  }
}

size_t padded(int64_t bytes) { return static_cast<size_t>(bytes + 255) / 256 * 256; }

// Whether x enters the product in codes, but has to be made them.
bool is_to_be_coded(const LinearArgs& a) { return a.weight_type == Type::e4m3 && !a.x_unit; }

// In scratch memory: x as it enters the product, the scales of its rows behind it, then the weight, and the product.
struct Room {
  size_t x = 0, units = 0, weight = 0, product = 0;
  explicit Room(const LinearArgs& a) {
    const bool eight = is_to_be_coded(a);
    if (a.norm != Norm::none || eight) x = padded(a.rows * a.width * (eight ? 1 : size_of(a.signal)));
    if (eight) units = padded(a.rows * 4);
    if (a.weight_type == Type::u8) weight = padded(a.out * a.width * size_of(a.signal));
    if (a.y_unit && !eight_serves(a.width, a.out)) product = padded(a.rows * a.out * size_of(a.signal));
  }
  size_t all() const { return x + units + weight + product; }
};

const char* product_in_codes(const LinearArgs& a, const void* x, const float* units, void* stream) {
  EightArgs e{};
  e.rows = a.rows, e.width = a.width, e.out = a.out, e.bias_type = a.bias_type, e.activation = a.activation;
  e.x = x, e.weight = a.weight, e.bias = a.bias, e.x_unit = units, e.y_unit = a.y_unit, e.y = a.y;
  e.weight_unit = static_cast<const float*>(a.weight_scale);
  return eight_cuda(e, stream);
}

template <typename T>
const char* launch_normalize(const LinearArgs& a, void* to, float* units, void* stream) {
  constexpr int kFew = 16 / sizeof(T);
  if (a.rows >= kManyRows && a.width % kFew == 0 && a.width <= 32 * kFew * kMostHeld) {
    const auto kernel = a.width <= 16 * kFew * kMostHeld ? normalize_many<T, kMostHeld / 2> : normalize_many<T, kMostHeld>;
    const int64_t blocks = (a.rows + kThreads / 32 - 1) / (kThreads / 32), most = 2 * gpu().processors;
    const dim3 grid(static_cast<unsigned>(blocks < most ? blocks : most));
    return launch(kernel, grid, dim3(kThreads), 2 * a.width * sizeof(float), stream, a, to, units);
  }
  auto kernel = a.width > kThreads * kFew ? normalize<T, kFew, 4> : normalize<T, kFew, 1>;
  if (a.width % kFew) kernel = normalize<T, 1, 4>;
  return launch(kernel, dim3(static_cast<unsigned>(a.rows)), dim3(kThreads), 0, stream, a, to, units);
}

template <typename T>
const char* many_rows(const LinearArgs& a, void* scratch, void* stream) {
  constexpr int kFew = 16 / sizeof(T);
  const bool eight = a.weight_type == Type::e4m3, four = a.weight_type == Type::u8;
  const Room room(a);
  auto* memory = static_cast<char*>(scratch);
  const void *x = a.x, *weight = a.weight;
  auto* units = room.units ? reinterpret_cast<float*>(memory + room.x) : nullptr;
  const float* x_unit = a.x_unit ? a.x_unit : units;
  if (four) {
    auto* to = memory + room.x + room.units;
    const dim3 grid(static_cast<unsigned>((a.out * (a.width / 32) + kThreads - 1) / kThreads));
    if (const char* problem = launch(expand<T>, grid, dim3(kThreads), 0, stream, a, to)) return problem;
    weight = to;
  }
  if (room.x) {
    if (const char* problem = launch_normalize<T>(a, scratch, units, stream)) return problem;
    x = scratch;
  }
  if (a.y_unit && !room.product) return product_in_codes(a, x, x_unit, stream);
  auto* product = static_cast<T*>(room.product ? memory + room.x + room.units + room.weight : a.y);
  Product p{};
  p.rows = a.rows, p.width = a.width, p.out = a.out, p.type = a.signal, p.inputs = four ? a.signal : a.weight_type;
  p.x = x, p.weight = weight, p.y = product;
  if (eight) p.x_scale = x_unit, p.weight_scale = static_cast<const float*>(a.weight_scale);
  LinearArgs rest = a;
  if (!a.bias || (a.bias_type == a.signal && !(eight && a.signal == Type::f32))) {  // the product adds it, perhaps more
    p.bias = a.bias, rest.bias = nullptr;
    if (a.activation == Activation::gelu_tanh) p.gelu_tanh = true, rest.activation = Activation::none;
    if (a.activation == Activation::none) p.residual = a.residual, rest.residual = nullptr;
  }
  if (const char* problem = multiply(p, stream)) return problem;
  if (!rest.bias && !rest.residual && rest.activation == Activation::none && !a.y_unit) return nullptr;
  const auto kernel = a.out % kFew ? finish<T, 1> : finish<T, kFew>;
  const int64_t each = kThreads * (a.out % kFew ? 1 : kFew);
  const dim3 grid(static_cast<unsigned>((a.rows * a.out + each - 1) / each));
  return launch(kernel, grid, dim3(kThreads), 0, stream, rest, product);
}

template <typename W, typename T>
const char* streamed_or_many(const LinearArgs& a, void* scratch, void* stream) {
  if (gemv_serves<W>(a)) return launch_gemv<W, T>(a, stream);
  return few_serves<W>(a) ? launch_few<W, T>(a, stream) : many_rows<T>(a, scratch, stream);
}

template <typename T>
const char* linear(const LinearArgs& a, void* scratch, void* stream) {
  return a.weight_type == Type::e4m3 ? streamed_or_many<Eight, T>(a, scratch, stream)
                                     : streamed_or_many<Plain<T>, T>(a, scratch, stream);
}

}  // namespace

size_t linear_scratch(const LinearArgs& a) { return Room(a).all(); }

const char* linear_cuda(const LinearArgs& a, void* scratch, void* stream) {
  const bool four = a.weight_type == Type::u8;
  if (a.signal == Type::f32) return many_rows<float>(a, scratch, stream);
  if (a.signal == Type::bf16) return four ? many_rows<Brain>(a, scratch, stream) : linear<Brain>(a, scratch, stream);
  return four ? streamed_or_many<Four, Half>(a, scratch, stream) : linear<Half>(a, scratch, stream);
}

}  // namespace lhcompile
