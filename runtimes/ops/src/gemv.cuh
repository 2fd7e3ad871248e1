// Linear for a few rows: the weight is streamed once, in one pass with the norm before it and what comes after it.
//
// Every multiprocessor has an equal share of the outputs, and every warp of its block streams rows of the weight
// through a ring of its own in shared memory, by bulk copies that begin before the kernel in front has finished:
// weights are constants. x, normalized and rounded to the signal's type, lies in shared memory too.
#pragma once

#include "device.cuh"

namespace lhcompile {

constexpr int kWarps = 16;
constexpr int kPiece = 2048;  // bytes of one copy
constexpr int kStages = 3;    // copies in flight, a warp
constexpr int kMostRows = 2;  // rows of x in one pass; from three on, cuBLASLt is as fast

// How 16 bytes of the weight become numbers. Where kQuantized, rows of x are rounded to e4m3 too, each with a scale.
template <typename T>
struct Plain {
  static constexpr int kCount = 16 / sizeof(T);
  static constexpr bool kQuantized = false;
  __device__ static void unpack(const uint4* from, float (&to)[kCount]) {
    load<T, kCount>(reinterpret_cast<const T*>(from), to);
  }
};

struct Eight {
  static constexpr int kCount = 16;
  static constexpr bool kQuantized = true;
  __device__ static void unpack(const uint4* from, float (&to)[kCount]) {
    const uint4 bits = *from;
    const uint32_t words[] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < kCount / 2; i++) {
      const auto pair = static_cast<__nv_fp8x2_storage_t>(words[i / 2] >> (i % 2 * 16));
      const float2 both = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
      to[2 * i] = both.x, to[2 * i + 1] = both.y;
    }
  }
};

struct GemvArgs {
  LinearArgs linear;
  int64_t row_bytes;  // of one output's weights
  int pieces;         // of one output's weights
};

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
__device__ inline void barrier_begin(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)));
}
__device__ inline void copy_begin(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
__device__ inline void copy_await(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// The rows of the weight that one warp streams, piece by piece.
struct Stream {
  const char* weight;
  char* ring;
  uint64_t* barriers;
  int64_t first, row_bytes;  // first output; the others follow in steps of kWarps
  int pieces, count;         // count: of all pieces

  __device__ int bytes(int task) const {
    const int64_t left = row_bytes - static_cast<int64_t>(task % pieces) * kPiece;
    return left < kPiece ? static_cast<int>(left) : kPiece;
  }
  __device__ int64_t output(int task) const { return first + task / pieces * kWarps; }
  __device__ void begin(int task) const {
    const char* from = weight + output(task) * row_bytes + static_cast<int64_t>(task % pieces) * kPiece;
    copy_begin(ring + task % kStages * kPiece, from, bytes(task), barriers + task % kStages);
  }
};

// M numbers of every thread joined over the block, by `join`; `room` has kWarps · M places.
template <int M, typename F>
__device__ inline void over_block(float (&x)[M], float* room, const F& join) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x[m] = join(x[m], __shfl_xor_sync(~0u, x[m], step));
  __syncthreads();
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int m = 0; m < M; m++) room[threadIdx.x / 32 * M + m] = x[m];
  __syncthreads();
#pragma unroll
  for (int m = 0; m < M; m++) {
    x[m] = room[m];
#pragma unroll
    for (int w = 1; w < kWarps; w++) x[m] = join(x[m], room[w * M + m]);
  }
}

__device__ inline float added(float x, float y) { return x + y; }

template <int N>
__device__ inline void load_floats(const float* from, float (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + i);
    to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
  }
}

// M rows of x in shared memory, as they enter the product. A thread has every 512th vector of 16 bytes, and touches no
// other between the two barriers of a sum.
template <typename W, typename T, int M>
struct TakenRows {
  static constexpr int kCount = 16 / sizeof(T), kStep = kWarps * 32 * kCount;
  const LinearArgs& a;
  T* rows;
  float* room;
  float mean[M], by[M], unit[M];  // unit: what a 1 means where rows are quantized

  // Calls work(i, scale, shift) for all vectors of this thread.
  template <typename F>
  __device__ void vectors(const F& work) const {
    const int width = static_cast<int>(a.width);
    for (int i = threadIdx.x * kCount; i < width; i += kStep) {
      float scale[kCount], shift[kCount] = {};
#pragma unroll
      for (int j = 0; j < kCount; j++) scale[j] = 1.0f;
      if (a.norm_scale) load_floats(a.norm_scale + i, scale);
      if (a.norm_bias) load_floats(a.norm_bias + i, shift);
      work(i, scale, shift);
    }
  }
  __device__ T* at(int m, int i) const { return rows + m * a.width + i; }

  __device__ void take() {
    const int width = static_cast<int>(a.width);
    const T* x = static_cast<const T*>(a.x);
    float sums[M] = {};
    for (int i = threadIdx.x * kCount; i < width; i += kStep)
#pragma unroll
      for (int m = 0; m < M; m++) {
        const Vector<T, kCount> bits = fetch<T, kCount>(x + m * a.width + i);
        put(bits, at(m, i));
        if (a.norm == Norm::layer)
#pragma unroll
          for (int j = 0; j < kCount; j++) sums[m] += widen(bits.element[j]);
      }
#pragma unroll
    for (int m = 0; m < M; m++) mean[m] = 0.0f, by[m] = 1.0f;
    if (a.norm == Norm::layer) over_block<M>(sums, room, added);
    if (a.norm != Norm::none) spread(sums);
    if (W::kQuantized) return quantize();
    if (a.norm == Norm::none) return;
    vectors([&](int i, const float (&scale)[kCount], const float (&shift)[kCount]) {
#pragma unroll
      for (int m = 0; m < M; m++) {
        float x[kCount];
        normed(m, i, scale, shift, x);
        store<T, kCount>(x, at(m, i));
      }
    });
  }
  __device__ void normed(int m, int i, const float (&scale)[kCount], const float (&shift)[kCount],
                         float (&to)[kCount]) const {
    load<T, kCount>(at(m, i), to);
#pragma unroll
    for (int j = 0; j < kCount; j++) to[j] = (to[j] - mean[m]) * by[m] * scale[j] + shift[j];
  }

  __device__ void spread(const float (&sums)[M]) {
    const int width = static_cast<int>(a.width);
    float squares[M] = {};
#pragma unroll
    for (int m = 0; m < M; m++) mean[m] = sums[m] / width;
    for (int i = threadIdx.x * kCount; i < width; i += kStep)
#pragma unroll
      for (int m = 0; m < M; m++) {
        float x[kCount];
        load<T, kCount>(at(m, i), x);
#pragma unroll
        for (int j = 0; j < kCount; j++) squares[m] += (x[j] - mean[m]) * (x[j] - mean[m]);
      }
    over_block<M>(squares, room, added);
#pragma unroll
    for (int m = 0; m < M; m++) by[m] = rsqrtf(squares[m] / width + a.epsilon);
  }

  // Every e4m3 number is one of T.
  __device__ void quantize() {
    float largest[M] = {};
    vectors([&](int i, const float (&scale)[kCount], const float (&shift)[kCount]) {
#pragma unroll
      for (int m = 0; m < M; m++) {
        float x[kCount];
        normed(m, i, scale, shift, x);
#pragma unroll
        for (int j = 0; j < kCount; j++) largest[m] = fmaxf(largest[m], fabsf(x[j]));
      }
    });
    over_block<M>(largest, room, [](float x, float y) { return fmaxf(x, y); });
#pragma unroll
    for (int m = 0; m < M; m++) unit[m] = fmaxf(largest[m], kSmallest) / kLargest;
    vectors([&](int i, const float (&scale)[kCount], const float (&shift)[kCount]) {
#pragma unroll
      for (int m = 0; m < M; m++) {
        float x[kCount];
        normed(m, i, scale, shift, x);
#pragma unroll
        for (int j = 0; j < kCount; j++) x[j] = from_eight(to_eight(x[j] / unit[m]));
        store<T, kCount>(x, at(m, i));
      }
    });
  }
};

// What is added to the block's outputs: a row of biases, and a row of the residual for each row of x.
template <typename T, int M>
struct Endings {
  float* memory;
  int count;

  __device__ void take_bias(const LinearArgs& a, int64_t begin) const {
    for (int i = threadIdx.x; i < count; i += kWarps * 32)
      memory[i] = a.bias ? load_any(a.bias, a.bias_type, begin + i) : 0.0f;
  }
  __device__ void take_residual(const LinearArgs& a, int64_t begin) const {
    if (!a.residual) return;
    const T* from = static_cast<const T*>(a.residual) + begin;
#pragma unroll
    for (int m = 0; m < M; m++)
      for (int i = threadIdx.x; i < count; i += kWarps * 32) memory[(1 + m) * count + i] = widen(from[m * a.out + i]);
  }
  __device__ void finish(const LinearArgs& a, int64_t begin, int64_t output, int m, float total) const {
    const int i = static_cast<int>(output - begin);
    total = activated(a.activation, total + memory[i]);
    if (a.residual) total += memory[(1 + m) * count + i];
    narrow(total, static_cast<T*>(a.y) + m * a.out + output);
  }
};

// Brings constants that are read after the kernel in front into the cache.
__device__ inline void expect(const float* from, int64_t count) {
  if (!from) return;
  for (int64_t i = threadIdx.x * 8; i < count; i += kWarps * 32 * 8)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from + i));
}

template <typename W, typename T, int M>
__global__ void __launch_bounds__(kWarps * 32) gemv(const __grid_constant__ GemvArgs g) {
  extern __shared__ __align__(128) char memory[];
  const LinearArgs& a = g.linear;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto* barriers = reinterpret_cast<uint64_t*>(memory + kWarps * kStages * kPiece);
  auto* room = reinterpret_cast<float*>(barriers + kWarps * kStages);
  T* rows = reinterpret_cast<T*>(room + kWarps * kMostRows);
  const int64_t begin = a.out * blockIdx.x / gridDim.x, end = a.out * (blockIdx.x + 1) / gridDim.x;
  const int64_t mine = begin + warp;
  const int outputs = mine < end ? static_cast<int>((end - mine + kWarps - 1) / kWarps) : 0;
  const Stream stream{static_cast<const char*>(a.weight),
                      memory + warp * kStages * kPiece,
                      barriers + warp * kStages,
                      mine,
                      g.row_bytes,
                      g.pieces,
                      outputs * g.pieces};
  if (lane == 0) {
#pragma unroll
    for (int s = 0; s < kStages; s++) barrier_begin(stream.barriers + s);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    for (int task = 0; task < kStages && task < stream.count; task++) stream.begin(task);
  }
  release_next();
  const Endings<T, M> endings{reinterpret_cast<float*>(rows + M * a.width), static_cast<int>(end - begin)};
  endings.take_bias(a, begin);
  expect(a.norm_scale, a.width);
  expect(a.norm_bias, a.width);
  await_previous();
  endings.take_residual(a, begin);
  TakenRows<W, T, M> taken{a, rows, room};
  taken.take();
  __syncthreads();

  float sums[M] = {};
  for (int task = 0; task < stream.count; task++) {
    const int piece = task % g.pieces;
    copy_await(stream.barriers + task % kStages, task / kStages & 1);
    const auto* bits = reinterpret_cast<const uint4*>(stream.ring + task % kStages * kPiece);
    const T* heard = rows + static_cast<int64_t>(piece) * (kPiece / 16) * W::kCount;
    const int vectors = stream.bytes(task) / 16;
#pragma unroll 2
    for (int v = lane; v < vectors; v += 32) {
      float w[W::kCount];
      W::unpack(bits + v, w);
#pragma unroll
      for (int m = 0; m < M; m++) {
        constexpr int kCount = 16 / sizeof(T);
#pragma unroll
        for (int part = 0; part < W::kCount; part += kCount) {
          float x[kCount];
          load<T, kCount>(heard + m * a.width + v * W::kCount + part, x);
#pragma unroll
          for (int j = 0; j < kCount; j++) sums[m] += w[part + j] * x[j];
        }
      }
    }
    __syncwarp();
    if (lane == 0 && task + kStages < stream.count) stream.begin(task + kStages);
    if (piece + 1 < g.pieces) continue;
    float total = 0;
#pragma unroll
    for (int m = 0; m < M; m++) {
      if (W::kQuantized) sums[m] *= taken.unit[m];
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sums[m] += __shfl_xor_sync(~0u, sums[m], step);
      if (lane == m) total = sums[m];
      sums[m] = 0;
    }
    if (lane < M) {
      const int64_t output = stream.output(task);
      if (a.weight_scale) total *= static_cast<const float*>(a.weight_scale)[output];
      endings.finish(a, begin, output, lane, total);
    }
  }
}

inline int64_t gemv_blocks(const LinearArgs& a) { return a.out < gpu().processors ? a.out : gpu().processors; }

template <typename T>
size_t gemv_shared(const LinearArgs& a, int64_t rows) {
  const int64_t outputs = (a.out + gemv_blocks(a) - 1) / gemv_blocks(a);
  return kWarps * kStages * (kPiece + 8) + kWarps * kMostRows * 4 + rows * a.width * sizeof(T) +
         (1 + rows) * outputs * 4;
}

template <typename W, typename T, int M>
const char* launch_gemv(const LinearArgs& a, void* stream) {
  GemvArgs g{a, a.width * 16 / W::kCount, 0};
  g.pieces = static_cast<int>((g.row_bytes + kPiece - 1) / kPiece);
  const dim3 grid(static_cast<unsigned>(gemv_blocks(a)));
  return launch(gemv<W, T, M>, grid, dim3(kWarps * 32), gemv_shared<T>(a, M), stream, g);
}

// Whether the rows are few enough, and sizes and addresses those of 16-byte vectors.
template <typename W, typename T>
bool gemv_serves(const LinearArgs& a) {
  auto even = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; };
  return a.rows <= kMostRows && a.width % W::kCount == 0 && a.width * sizeof(T) % 16 == 0 && even(a.x) &&
         even(a.weight) && even(a.norm_scale) && even(a.norm_bias) &&
         gemv_shared<T>(a, a.rows) <= static_cast<size_t>(gpu().shared);
}

template <typename W, typename T>
const char* launch_gemv(const LinearArgs& a, void* stream) {
  switch (a.rows) {
    case 1:
      return launch_gemv<W, T, 1>(a, stream);
    default:
      return launch_gemv<W, T, 2>(a, stream);
  }
}

}  // namespace lhcompile
