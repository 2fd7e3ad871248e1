// Linear for one or two rows of 16-bit numbers: a warp streams rows of the weight through a ring of its own in shared
// memory, filled from before the kernel in front has finished, and every multiprocessor has an equal share of the
// outputs. Between other kernels it is faster than few_rows.cuh, for no output waits for more than one warp.
#pragma once

#include "stream.cuh"

namespace lhcompile {

constexpr int kGemvWarps = 16, kGemvThreads = 32 * kGemvWarps;
constexpr int kGemvRows = 2;      // of x at most
constexpr int kGemvPiece = 2048;  // bytes of one copy
constexpr int kGemvStages = 3;    // copies in flight, a warp

struct GemvArgs {
  LinearArgs linear;
  int row_bytes, pieces;  // of one output's weights
};

// The rows of the weight that one warp streams, piece by piece.
struct Pieces {
  const char* weight;
  char* ring;
  uint64_t* barriers;
  int64_t first;  // output; the others follow in steps of kGemvWarps
  int row_bytes, pieces, count;

  __device__ int bytes(int task) const { return min(row_bytes - task % pieces * kGemvPiece, kGemvPiece); }
  __device__ int64_t output(int task) const { return first + task / pieces * kGemvWarps; }
  __device__ void begin(int task) const {
    const int slot = task % kGemvStages;
    copies_expect(barriers + slot, bytes(task));
    copy_begin(ring + slot * kGemvPiece, weight + output(task) * row_bytes + task % pieces * kGemvPiece, bytes(task),
               barriers + slot);
  }
};

// What is added to the block's outputs: a row of biases, and a row of the residual for each row of x.
template <typename T, int M>
struct Added {
  float* memory;
  int count;

  __device__ void take_bias(const LinearArgs& a, int64_t begin) const {
    for (int i = threadIdx.x; i < count; i += kGemvThreads)
      memory[i] = a.bias ? load_any(a.bias, a.bias_type, begin + i) : 0.0f;
  }
  __device__ void take_residual(const LinearArgs& a, int64_t begin) const {
    if (!a.residual) return;
    const T* from = static_cast<const T*>(a.residual) + begin;
#pragma unroll
    for (int m = 0; m < M; m++)
      for (int i = threadIdx.x; i < count; i += kGemvThreads) memory[(1 + m) * count + i] = widen(from[m * a.out + i]);
  }
  __device__ void finish(const LinearArgs& a, int64_t begin, int64_t output, int m, float total) const {
    const int i = static_cast<int>(output - begin);
    total = activated(a.activation, total + memory[i]);
    if (a.residual) total += memory[(1 + m) * count + i];
    narrow(total, static_cast<T*>(a.y) + m * a.out + output);
  }
};

// Registers for two blocks, and one of the mixer between them, on a multiprocessor: the next kernel can begin.
template <typename T, int M>
__global__ void __maxnreg__(56) gemv(const __grid_constant__ GemvArgs g) {
  extern __shared__ __align__(128) char memory[];
  constexpr int kCount = 16 / sizeof(T);
  const LinearArgs& a = g.linear;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = static_cast<int>(a.width);
  auto* barriers = reinterpret_cast<uint64_t*>(memory + kGemvWarps * kGemvStages * kGemvPiece);
  auto* room = reinterpret_cast<float*>(barriers + kGemvWarps * kGemvStages);
  T* rows = reinterpret_cast<T*>(room + 2 * kGemvWarps);
  const int64_t begin = a.out * blockIdx.x / gridDim.x, end = a.out * (blockIdx.x + 1) / gridDim.x;
  const int64_t mine = begin + warp;
  const int outputs = mine < end ? static_cast<int>((end - mine + kGemvWarps - 1) / kGemvWarps) : 0;
  const Pieces stream{static_cast<const char*>(a.weight),
                      memory + warp * kGemvStages * kGemvPiece,
                      barriers + warp * kGemvStages,
                      mine,
                      g.row_bytes,
                      g.pieces,
                      outputs * g.pieces};
  if (lane == 0) {
#pragma unroll
    for (int s = 0; s < kGemvStages; s++) barrier_begin(stream.barriers + s);
    barriers_begun();
    for (int task = 0; task < kGemvStages && task < stream.count; task++) stream.begin(task);
  }
  release_next();
  const Added<T, M> added{reinterpret_cast<float*>(rows + M * width), static_cast<int>(end - begin)};
  added.take_bias(a, begin);
  const Entering<T, T, kGemvWarps> entering(a, rows, nullptr, room, width, width);
  await_previous();
  added.take_residual(a, begin);
  entering.take();

  float sums[M] = {};
  for (int task = 0; task < stream.count; task++) {
    const int piece = task % g.pieces;
    copies_await(stream.barriers + task % kGemvStages, task / kGemvStages & 1);
    const auto* weights = reinterpret_cast<const T*>(stream.ring + task % kGemvStages * kGemvPiece);
    const T* heard = rows + piece * (kGemvPiece / static_cast<int>(sizeof(T)));
    const int count = stream.bytes(task) / static_cast<int>(sizeof(T));
#pragma unroll 2
    for (int i = lane * kCount; i < count; i += 32 * kCount) {
      float w[kCount];
      load<T, kCount>(weights + i, w);
#pragma unroll
      for (int m = 0; m < M; m++) {
        float x[kCount];
        load<T, kCount>(heard + m * width + i, x);
#pragma unroll
        for (int j = 0; j < kCount; j++) sums[m] += w[j] * x[j];
      }
    }
    __syncwarp();
    if (lane == 0 && task + kGemvStages < stream.count) stream.begin(task + kGemvStages);
    if (piece + 1 < g.pieces) continue;
    float total = 0;
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sums[m] += __shfl_xor_sync(~0u, sums[m], step);
      if (lane == m) total = sums[m];
      sums[m] = 0;
    }
    if (lane < M) added.finish(a, begin, stream.output(task), lane, total);
  }
}

inline int64_t gemv_blocks(const LinearArgs& a) { return a.out < gpu().processors ? a.out : gpu().processors; }

template <typename T>
size_t gemv_shared(const LinearArgs& a) {
  const int64_t outputs = (a.out + gemv_blocks(a) - 1) / gemv_blocks(a);
  return kGemvWarps * (kGemvStages * (kGemvPiece + 8) + 2 * 4) + a.rows * a.width * sizeof(T) +
         (1 + a.rows) * outputs * 4;
}

template <typename T>
bool gemv_serves(const LinearArgs& a) {
  return a.rows <= kGemvRows && a.width * sizeof(T) % 16 == 0 && stream_serves(a, gemv_shared<T>(a));
}

template <typename T>
const char* launch_gemv(const LinearArgs& a, void* stream) {
  GemvArgs g{a, static_cast<int>(a.width * sizeof(T)), 0};
  g.pieces = (g.row_bytes + kGemvPiece - 1) / kGemvPiece;
  const dim3 grid(static_cast<unsigned>(gemv_blocks(a)));
  return launch(a.rows == 1 ? gemv<T, 1> : gemv<T, 2>, grid, dim3(kGemvThreads), gemv_shared<T>(a), stream, g);
}

}  // namespace lhcompile
