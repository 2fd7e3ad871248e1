// Linear for one or two rows of 16-bit numbers: a warp streams rows of the weight through a ring of its own in shared
// memory, filled from before the kernel in front has finished, and every multiprocessor has an equal share of the
// outputs. Between other kernels it is faster than few_rows.cuh, for no output waits for more than one warp.
#pragma once

#include "mixer_step.cuh"
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

// The outputs of a block: neighbours, or those of neighbouring channels in each of a mixer's three parts.
struct Outputs {
  int64_t first;
  int count, channels = 0, part = 0;  // channels of the block, and of a part that lies in one piece; 0 without a mixer

  __device__ int64_t operator[](int i) const {
    if (channels == 0) return first + i;
    const int channel = static_cast<int>(first) + i % channels;
    return channel / part * 3 * part + i / channels * part + channel % part;
  }
};

// The rows of the weight that one warp streams, piece by piece.
struct Pieces {
  const Outputs& outputs;
  const char* weight;
  char* ring;
  uint64_t* barriers;
  int first;  // of the block's outputs; the others follow in steps of kGemvWarps
  int row_bytes, pieces, count;

  __device__ int bytes(int task) const { return min(row_bytes - task % pieces * kGemvPiece, kGemvPiece); }
  __device__ int place(int task) const { return first + task / pieces * kGemvWarps; }
  __device__ int64_t output(int task) const { return outputs[place(task)]; }
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
  const Outputs& outputs;
  float* memory;

  __device__ void take_bias(const LinearArgs& a) const {
    for (int i = threadIdx.x; i < outputs.count; i += kGemvThreads)
      memory[i] = a.bias ? load_any(a.bias, a.bias_type, outputs[i]) : 0.0f;
  }
  __device__ void take_residual(const LinearArgs& a) const {
    if (!a.residual) return;
    const T* from = static_cast<const T*>(a.residual);
#pragma unroll
    for (int m = 0; m < M; m++)
      for (int i = threadIdx.x; i < outputs.count; i += kGemvThreads)
        memory[(1 + m) * outputs.count + i] = widen(from[m * a.out + outputs[i]]);
  }
  __device__ void finish(const LinearArgs& a, int i, int m, float total) const {
    total = activated(a.activation, total + memory[i]);
    if (a.residual) total += memory[(1 + m) * outputs.count + i];
    narrow(total, static_cast<T*>(a.y) + m * a.out + outputs[i]);
  }
};

// What follows the product in the same kernel: nothing, or HyenaStep of one row, whose channels' three parts are
// outputs of the same block.
struct Alone {
  struct Args {};
  static constexpr bool kMixes = false;
  __device__ static Outputs outputs(const LinearArgs& a, const Args&) {
    const int64_t begin = a.out * blockIdx.x / gridDim.x, end = a.out * (blockIdx.x + 1) / gridDim.x;
    return {begin, static_cast<int>(end - begin)};
  }
};

template <typename T, typename S, int kTaps>
struct Mixed {
  struct Args {
    MixerArgs mixer;
    int width;  // of the tables: a power of two, no less than the channels of a block
  };
  static constexpr bool kMixes = true;
  __device__ static Outputs outputs(const LinearArgs&, const Args& then) {
    const int64_t all = then.mixer.channels, begin = all * blockIdx.x / gridDim.x;
    const int channels = static_cast<int>(all * (blockIdx.x + 1) / gridDim.x - begin);
    return {begin, 3 * channels, channels, static_cast<int>(then.mixer.block)};
  }
  using Work = Step<T, T, S, 1, kTaps, false, true>;
  __device__ static Work work(const Args& then, const Rows& rows, const float* tables, const Outputs& outputs) {
    return Work(then.mixer, rows, tables + threadIdx.x, then.width, static_cast<int>(outputs.first) + threadIdx.x);
  }
};

// Registers for two blocks, and one of the mixer between them, on a multiprocessor: the next kernel can begin.
template <typename T, int M, typename Then>
__global__ void __maxnreg__(56)
    gemv(const __grid_constant__ GemvArgs g, const __grid_constant__ typename Then::Args then) {
  extern __shared__ __align__(128) char memory[];
  constexpr int kCount = 16 / sizeof(T);
  const LinearArgs& a = g.linear;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = static_cast<int>(a.width);
  auto* barriers = reinterpret_cast<uint64_t*>(memory + kGemvWarps * kGemvStages * kGemvPiece);
  auto* room = reinterpret_cast<float*>(barriers + kGemvWarps * kGemvStages);
  T* rows = reinterpret_cast<T*>(room + 2 * kGemvWarps);
  const Outputs outputs = Then::outputs(a, then);
  const int mine = warp < outputs.count ? (outputs.count - warp + kGemvWarps - 1) / kGemvWarps : 0;
  const Pieces stream{outputs,
                      static_cast<const char*>(a.weight),
                      memory + warp * kGemvStages * kGemvPiece,
                      barriers + warp * kGemvStages,
                      warp,
                      g.row_bytes,
                      g.pieces,
                      mine * g.pieces};
  if (lane == 0) {
#pragma unroll
    for (int s = 0; s < kGemvStages; s++) barrier_begin(stream.barriers + s);
    barriers_begun();
    for (int task = 0; task < kGemvStages && task < stream.count; task++) stream.begin(task);
  }
  release_next();
  const Added<T, M> added{outputs, reinterpret_cast<float*>(rows + M * width)};
  added.take_bias(a);
  float* tables = added.memory + (1 + M) * outputs.count;
  if constexpr (Then::kMixes) {
    fill_tables(then.mixer, Rows(then.mixer), tables, then.width, outputs.first);
    if (threadIdx.x < outputs.channels) Then::work(then, Rows(then.mixer), tables, outputs).bring();
  }
  const Entering<T, T, kGemvWarps> entering(a, rows, nullptr, room, width, width);
  await_previous();
  added.take_residual(a);
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
    if (lane < M) added.finish(a, stream.place(task), lane, total);
  }
  if constexpr (Then::kMixes) {
    __syncthreads();
    if (threadIdx.x >= outputs.channels) return;
    const Rows places(then.mixer);
    const typename Then::Work work = Then::work(then, places, tables, outputs);
    typename Then::Work::Row row;
    work.read(0, row);
    work.run(row);
  }
}

// Blocks that share so many outputs, or channels with their three.
inline int64_t gemv_blocks(int64_t all) { return all < gpu().processors ? all : gpu().processors; }

template <typename T>
size_t gemv_shared(const LinearArgs& a, int64_t outputs) {
  return kGemvWarps * (kGemvStages * (kGemvPiece + 8) + 2 * 4) + a.rows * a.width * sizeof(T) +
         (1 + a.rows) * outputs * 4;
}
template <typename T>
size_t gemv_shared(const LinearArgs& a) {
  const int64_t blocks = gemv_blocks(a.out);
  return gemv_shared<T>(a, (a.out + blocks - 1) / blocks);
}

template <typename T>
bool gemv_serves(const LinearArgs& a) {
  return a.rows <= kGemvRows && a.width * sizeof(T) % 16 == 0 && stream_serves(a, gemv_shared<T>(a));
}

template <typename T>
GemvArgs gemv_args(const LinearArgs& a) {
  const int row_bytes = static_cast<int>(a.width * sizeof(T));
  return {a, row_bytes, (row_bytes + kGemvPiece - 1) / kGemvPiece};
}

template <typename T>
const char* launch_gemv(const LinearArgs& a, void* stream) {
  const dim3 grid(static_cast<unsigned>(gemv_blocks(a.out)));
  return launch(a.rows == 1 ? gemv<T, 1, Alone> : gemv<T, 2, Alone>, grid, dim3(kGemvThreads), gemv_shared<T>(a),
                stream, gemv_args<T>(a), Alone::Args{});
}

// The most channels that a block of a mixed product has, and the width of its tables.
inline int64_t mixed_channels(const MixerArgs& m) {
  const int64_t blocks = gemv_blocks(m.channels);
  return (m.channels + blocks - 1) / blocks;
}
inline int mixed_width(const MixerArgs& m) {
  int width = 1;
  while (width < mixed_channels(m)) width *= 2;
  return width;
}
template <typename T>
size_t mixed_shared(const LinearArgs& a, const MixerArgs& m) {
  return gemv_shared<T>(a, 3 * mixed_channels(m)) + static_cast<size_t>(Rows(m).count) * mixed_width(m) * 4;
}

// Whether a product and the step behind it are one kernel.
template <typename T>
bool mixed_serves(const LinearArgs& a, const MixerArgs& m) {
  return a.rows == 1 && a.width * sizeof(T) % 16 == 0 && !m.index && mixed_width(m) <= kGemvThreads &&
         stream_serves(a, mixed_shared<T>(a, m));
}

template <typename T, typename S>
const char* launch_mixed(const LinearArgs& a, const MixerArgs& m, void* stream) {
  const dim3 grid(static_cast<unsigned>(gemv_blocks(m.channels)));
  auto run = [&](auto then) {
    using Then = decltype(then);
    return launch(gemv<T, 1, Then>, grid, dim3(kGemvThreads), mixed_shared<T>(a, m), stream, gemv_args<T>(a),
                  typename Then::Args{m, mixed_width(m)});
  };
  return m.taps == 3 ? run(Mixed<T, S, 3>()) : run(Mixed<T, S, 0>());
}

}  // namespace lhcompile
