// Linear for one or two rows: a warp streams pairs of rows of the weight through a ring of its own in shared memory,
// filled from before the kernel in front has finished, and every multiprocessor has an equal share of the outputs.
// Between other kernels it is faster than few_rows.cuh, for no output waits for more than one warp.
//
// The tensor cores multiply sixteen rows with eight. Row g of both factors is the same 64 bytes, of the weight and of
// x, so their product is on the diagonal, which is summed when a row has ended. The lower eight rows are the pair's
// second.
#pragma once

#include "stream.cuh"
#include "weights.cuh"

namespace lhcompile {

constexpr int kGemvWarps = 8, kGemvThreads = 32 * kGemvWarps;
// Rows of x at most; bytes of one row of a pair that come at once; such pieces in flight, a warp: the next kernel's
// ring has to fit beside this one's.
template <typename W>
constexpr int kGemvRows = sizeof(typename W::Entry) == 2 && !W::kScaled ? 2 : 1;
template <typename W>
constexpr int kGemvPiece = W::kScaled ? 1024 : 2048;
template <typename W, int M>
constexpr int kGemvStages = W::kScaled ? 4 : M == 1 ? 3 : 2;
template <typename W>
constexpr int kGemvSlot = 2 * (kGemvPiece<W> + (W::kScaled ? kGemvPiece<W> / 8 : 0));

struct GemvArgs {
  LinearArgs linear;
  int row_bytes;  // of one output's weights
};

// Fills a warp's ring with its pairs of rows, piece by piece; they follow each other in steps of 2 kGemvWarps rows. In
// the ring the second row's piece lies behind the first's, and their scales behind the room for both.
template <typename W, int kStages>
struct Pairs {
  const char *row, *scales;
  char* ring;
  uint64_t* barriers;
  int row_bytes, left;  // outputs from the first of the pair on
  int at = 0, slot = 0;

  __device__ Pairs(const GemvArgs& g, char* ring_, uint64_t* barriers_, int64_t first, int64_t end)
      : row(static_cast<const char*>(g.linear.weight) + first * g.row_bytes),
        scales(W::kScaled ? static_cast<const char*>(g.linear.weight_scale) + first * (g.row_bytes / 8) : nullptr),
        ring(ring_),
        barriers(barriers_),
        row_bytes(g.row_bytes),
        left(static_cast<int>(end - first)) {}
  __device__ void begin_all() {
#pragma unroll
    for (int s = 0; s < kStages; s++) barrier_begin(barriers + s);
    barriers_begun();
#pragma unroll
    for (int s = 0; s < kStages; s++) begin();
  }
  // Pieces of one row or of two.
  __device__ void copy(char* to, const char* from, int bytes, int pitch, int rows) const {
    if (bytes == pitch) return copy_begin(to, from, rows * bytes, barriers + slot);
    for (int r = 0; r < rows; r++) copy_begin(to + r * bytes, from + r * pitch, bytes, barriers + slot);
  }
  __device__ void begin() {
    if (left <= 0) return;
    const int bytes = min(row_bytes - at, kGemvPiece<W>), rows = min(left, 2);
    char* to = ring + slot * kGemvSlot<W>;
    copies_expect(barriers + slot, rows * (W::kScaled ? bytes + bytes / 8 : bytes));
    copy(to, row + at, bytes, row_bytes, rows);
    if (W::kScaled) copy(to + 2 * kGemvPiece<W>, scales + at / 8, bytes / 8, row_bytes / 8, rows);
    if (++slot == kStages) slot = 0;
    at += kGemvPiece<W>;
    if (at < row_bytes) return;
    at = 0, left -= 2 * kGemvWarps;
    row += static_cast<int64_t>(2 * kGemvWarps) * row_bytes;
    if (W::kScaled) scales += static_cast<int64_t>(2 * kGemvWarps) * (row_bytes / 8);
  }
};

// What the block's outputs are made of, beside the product: rows of biases and of scales, and of the residual for each
// row of x.
template <typename T, int M>
struct Rest {
  const LinearArgs& a;
  float* memory;
  const float* units;
  int64_t begin;
  int count;

  __device__ void take_constants() const {
    for (int i = threadIdx.x; i < count; i += kGemvThreads) {
      memory[i] = a.bias ? load_any(a.bias, a.bias_type, begin + i) : 0.0f;
      if (a.weight_type == Type::e4m3) memory[count + i] = static_cast<const float*>(a.weight_scale)[begin + i];
    }
  }
  __device__ void take_residual() const {
    if (!a.residual) return;
    const T* from = static_cast<const T*>(a.residual) + begin;
#pragma unroll
    for (int m = 0; m < M; m++)
      for (int i = threadIdx.x; i < count; i += kGemvThreads) memory[(2 + m) * count + i] = widen(from[m * a.out + i]);
  }
  __device__ void finish(int64_t output, int m, float total) const {
    const int i = static_cast<int>(output - begin);
    if (a.weight_type == Type::e4m3) total *= units[m] * memory[count + i];
    total = activated(a.activation, total + memory[i]);
    if (a.residual) total += memory[(2 + m) * count + i];
    const int64_t at = m * a.out + output;
    if (a.y_unit) {
      static_cast<uint8_t*>(a.y)[at] = to_eight(total / units[kMostRows + m]);
    } else {
      narrow(total, static_cast<T*>(a.y) + at);
    }
  }
};

// The sums of a pair, over the warp: each thread has those of the first row and of the second.
__device__ inline float2 diagonal(const float (&sums)[4]) {
  const int row = threadIdx.x % 32 / 4;
  float2 pair{};
  if (row / 2 == static_cast<int>(threadIdx.x % 4)) pair = {row % 2 ? sums[1] : sums[0], row % 2 ? sums[3] : sums[2]};
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    pair.x += __shfl_xor_sync(~0u, pair.x, step);
    pair.y += __shfl_xor_sync(~0u, pair.y, step);
  }
  return pair;
}

// A piece of a pair, of so many bytes a row, times M rows of x at the same inputs.
template <typename W, int M>
__device__ inline void multiply_piece(float (&sums)[M][4], const char* piece, int bytes,
                                      const typename W::Entry* heard, int width) {
  const auto* scales = reinterpret_cast<const Half*>(piece + 2 * kGemvPiece<W>);
#pragma unroll
  for (int part = 0; part < kGemvPiece<W>; part += 32 * 16) {
    const int i = part + threadIdx.x % 32 * 16;
    const bool there = i < bytes;
    uint4 upper{}, lower{};
    Half upper_scale{}, lower_scale{};
    if (there) {
      upper = *reinterpret_cast<const uint4*>(piece + i), lower = *reinterpret_cast<const uint4*>(piece + bytes + i);
      if (W::kScaled) upper_scale = scales[i / 16], lower_scale = scales[(bytes + i) / 16];
    }
#pragma unroll
    for (int m = 0; m < M; m++)
      W::add(sums[m], upper, lower, upper_scale, lower_scale, heard + m * width + i / 16 * W::kInputs, there,
             i / 32 % 4);
  }
}

// kCoded: x has codes already. Unless x is wide, two blocks, and one of the mixer between them, fit on a
// multiprocessor: the next kernel can begin.
template <typename W, typename T, int M, bool kCoded>
__global__ void __launch_bounds__(kGemvThreads, 2) gemv(const __grid_constant__ GemvArgs g) {
  extern __shared__ __align__(128) char memory[];
  using Entry = typename W::Entry;
  constexpr int kStages = kGemvStages<W, M>, kRing = kStages * kGemvSlot<W>;
  const LinearArgs& a = g.linear;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = static_cast<int>(a.width);
  char* ring = memory + warp * kRing;
  auto* barriers = reinterpret_cast<uint64_t*>(memory + kGemvWarps * kRing) + warp * kStages;
  const int64_t begin = a.out * blockIdx.x / gridDim.x, end = a.out * (blockIdx.x + 1) / gridDim.x;
  const int64_t mine = begin + 2 * warp;
  Pairs<W, kStages> pairs(g, ring, barriers, mine, end);
  if (lane == 0) pairs.begin_all();
  release_next();
  constexpr int kBarriers = kStages * static_cast<int>(sizeof(uint64_t));
  auto* units = reinterpret_cast<float*>(memory + kGemvWarps * (kRing + kBarriers));
  float* room = units + 2 * kMostRows;
  auto* x = reinterpret_cast<Entry*>(room + 2 * kGemvWarps);
  const Rest<T, M> rest{a, reinterpret_cast<float*>(x + M * width), units, begin, static_cast<int>(end - begin)};
  rest.take_constants();
  if constexpr (kCoded) {
    await_previous();
    rest.take_residual();
    enter_codes(a, x, units, width, width);
  } else {
    const Entering<T, Entry, kGemvWarps, W::kScaled, W::kScaled> entering(a, x, units, room, width, width);
    await_previous();
    rest.take_residual();
    entering.take();
  }

  int slot = 0;
  uint32_t parity = 0;
  for (int64_t output = mine; output < end; output += 2 * kGemvWarps) {
    float sums[M][4] = {};
    for (int at = 0; at < g.row_bytes; at += kGemvPiece<W>) {
      copies_await(barriers + slot, parity);
      multiply_piece<W, M>(sums, ring + slot * kGemvSlot<W>, min(g.row_bytes - at, kGemvPiece<W>),
                           x + at / 16 * W::kInputs, width);
      __syncwarp();
      if (++slot == kStages) slot = 0, parity ^= 1;
      if (lane == 0) pairs.begin();
    }
#pragma unroll
    for (int m = 0; m < M; m++) {
      const float2 pair = diagonal(sums[m]);
      if (lane == 2 * m) rest.finish(output, m, pair.x);
      if (lane == 2 * m + 1 && output + 1 < end) rest.finish(output + 1, m, pair.y);
    }
  }
}

inline int64_t gemv_blocks(const LinearArgs& a) { return a.out < gpu().processors ? a.out : gpu().processors; }

template <typename W>
size_t gemv_shared(const LinearArgs& a) {
  const int64_t outputs = (a.out + gemv_blocks(a) - 1) / gemv_blocks(a);
  const int stages = a.rows == 1 ? kGemvStages<W, 1> : kGemvStages<W, 2>;
  return kGemvWarps * stages * (kGemvSlot<W> + sizeof(uint64_t)) + 4 * (2 * kMostRows + 2 * kGemvWarps) +
         a.rows * a.width * sizeof(typename W::Entry) + 4 * (2 + a.rows) * outputs;
}

// Whether the rows are few enough, and sizes and addresses those of 16-byte vectors.
template <typename W>
bool gemv_serves(const LinearArgs& a) {
  return a.rows <= kGemvRows<W> && a.width % (W::kScaled ? 256 : W::kInputs) == 0 &&
         stream_serves(a, gemv_shared<W>(a));
}

template <typename W, typename T>
const char* launch_gemv(const LinearArgs& a, void* stream) {
  const GemvArgs g{a, static_cast<int>(a.width / W::kInputs * 16)};
  const dim3 grid(static_cast<unsigned>(gemv_blocks(a)));
  auto kernel = gemv<W, T, 1, false>;
  if constexpr (kGemvRows<W> == 2)
    if (a.rows == 2) kernel = gemv<W, T, 2, false>;
  if constexpr (std::is_same_v<W, Eight>)
    if (a.x_unit) kernel = gemv<W, T, 1, true>;
  return launch(kernel, grid, dim3(kGemvThreads), gemv_shared<W>(a), stream, g);
}

}  // namespace lhcompile
