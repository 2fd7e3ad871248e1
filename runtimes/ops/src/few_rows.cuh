// Linear for a few rows: the weight is streamed once, in one pass with the norm before it and what comes after it.
//
// Every multiprocessor has an equal share of tiles of 16 outputs. Its warps take pieces of the tiles' rows in turn, and
// multiply them with x on the tensor cores, whose other factor has room for eight rows. Weights come through a ring in
// shared memory by bulk copies, which keep no thread waiting; they are constants, so the ring is filled before the
// kernel in front has finished.
#pragma once

#include "stream.cuh"
#include "weights.cuh"

namespace lhcompile {

constexpr int kWarps = 8, kThreadsFew = 32 * kWarps;
constexpr int kTile = 16;        // outputs
constexpr int kPiece = 256;      // bytes of a row of the weight
constexpr int kRowPadding = 64;  // bytes between rows of x, which then lie in different banks

template <typename W>
constexpr int kStages = W::kScaled ? 2 : 3;  // pieces in flight, a warp
template <typename W>
constexpr int kScales = W::kScaled ? kPiece / 8 : 0;  // bytes of scales beside a row's piece

struct FewArgs {
  LinearArgs linear;
  int row_bytes, pieces, most_tiles;  // of a row of the weight, its pieces; tiles whose sums are held at once
};

// A place among the pieces of a block's tiles, of which a warp has number w of its kWarps, w + kWarps, …
struct Turn {
  int tile = 0, piece = threadIdx.x / 32;
  // To the first tile that has the piece, which may be some tiles on.
  __device__ void settle(int pieces) {
    while (piece >= pieces) piece -= pieces, tile++;
  }
};

// Fills a warp's ring with its pieces, a row of the tile by each of 16 threads.
template <typename W>
struct Stream {
  static constexpr int kSlot = kTile * (kPiece + kScales<W>);
  const FewArgs& g;
  char* ring;
  uint64_t* barriers;  // of the ring's slots
  int tiles, lane = threadIdx.x % 32, slot = 0;
  Turn turn;
  const char *from, *scales_from;  // this thread's row
  int left;                        // outputs from the tile's first on

  __device__ Stream(const FewArgs& g_, char* memory, int64_t first, int tiles_)
      : g(g_), ring(memory + threadIdx.x / 32 * kStages<W> * kSlot), tiles(tiles_) {
    barriers = reinterpret_cast<uint64_t*>(memory + kWarps * kStages<W> * kSlot) + threadIdx.x / 32 * kStages<W>;
    const int64_t row = first * kTile + lane;
    from = static_cast<const char*>(g.linear.weight) + row * g.row_bytes;
    if (W::kScaled) scales_from = static_cast<const char*>(g.linear.weight_scale) + row * (g.row_bytes / 8);
    left = static_cast<int>(g.linear.out - first * kTile);
    settle();
    if (g.row_bytes % kPiece)  // what lies behind a row's end is multiplied with zeros, so it has to be a number
      for (int i = lane * 16; i < kStages<W> * kSlot; i += 32 * 16) *reinterpret_cast<uint4*>(ring + i) = uint4{};
    if (lane == 0)
      for (int s = 0; s < kStages<W>; s++) barrier_begin(barriers + s);
    barriers_begun();
    __syncwarp();
  }
  __device__ void settle() {
    const int before = turn.tile;
    turn.settle(g.pieces);
    const int outputs = (turn.tile - before) * kTile;
    from += static_cast<int64_t>(outputs) * g.row_bytes, left -= outputs;
    if (W::kScaled) scales_from += static_cast<int64_t>(outputs) * (g.row_bytes / 8);
  }
  __device__ Half* scales(int at) const { return reinterpret_cast<Half*>(ring + at * kSlot + kTile * kPiece); }

  // After all threads of the warp have read what was in the slot.
  __device__ void begin() {
    if (turn.tile < tiles) {
      const int at = turn.piece * kPiece, bytes = min(kPiece, g.row_bytes - at), rows = min(left, kTile);
      if (lane == 0) copies_expect(barriers + slot, rows * (bytes + (W::kScaled ? bytes / 8 : 0)));
      __syncwarp();
      if (lane < rows) {
        copy_begin(ring + slot * kSlot + lane * kPiece, from + at, bytes, barriers + slot);
        if (W::kScaled)
          copy_begin(reinterpret_cast<char*>(scales(slot)) + lane * kScales<W>, scales_from + at / 8, bytes / 8,
                     barriers + slot);
      }
    }
    turn.piece += kWarps, slot = slot + 1 == kStages<W> ? 0 : slot + 1;
    if (turn.piece >= g.pieces) settle();
  }
};

// What one thread adds to one of the outputs, read while there is nothing else to do.
template <typename T>
struct Ending {
  float bias = 0, residual = 0, scale = 1;
  int64_t output = 0;
  int row = 0;

  __device__ void expect(const LinearArgs& a, int64_t first, int place) {
    row = place / kTile % static_cast<int>(a.rows);
    output = first + place / (kTile * static_cast<int>(a.rows)) * kTile + place % kTile;
    if (output >= a.out) return;
    if (a.bias) bias = load_any(a.bias, a.bias_type, output);
    if (a.weight_scale && a.weight_type == Type::e4m3) scale = static_cast<const float*>(a.weight_scale)[output];
  }
  __device__ void hear(const LinearArgs& a) {
    if (a.residual && output < a.out) residual = widen(static_cast<const T*>(a.residual)[row * a.out + output]);
  }
  __device__ void say(const LinearArgs& a, float total, const float* units) const {
    if (output >= a.out) return;
    if (a.weight_type == Type::e4m3) total *= units[row];
    total = activated(a.activation, total * scale + bias) + residual;
    const int64_t at = row * a.out + output;
    if (a.y_unit) {
      static_cast<uint8_t*>(a.y)[at] = to_eight(total / units[kMostRows + row]);
    } else {
      narrow(total, static_cast<T*>(a.y) + at);
    }
  }
};

// Sums of the warps: [tile][warp][row of x][output].
struct Sums {
  float* memory;
  int rows;
  __device__ float* of(int tile, int warp) const { return memory + (tile * kWarps + warp) * rows * kTile; }
  __device__ void keep(int tile, const float (&sums)[4]) const {
    float* to = of(tile, threadIdx.x / 32);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int m = lane % 4 * 2 + i % 2;
      if (m < rows) to[m * kTile + lane / 4 + i / 2 * 8] = sums[i];
    }
  }
  // Number `place` of the outputs, over the warps that have had a piece of its tile.
  __device__ float total(int place, int pieces, int tile_before) const {
    const int tile = place / (kTile * rows), begin = (tile_before + tile) * pieces;
    float all = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; warp++)
      if (((warp - begin) & (kWarps - 1)) < pieces) all += of(tile, warp)[place % (kTile * rows)];
    return all;
  }
};

// kCoded: x has codes already
template <typename W, typename T, bool kCoded>
__global__ void __launch_bounds__(kThreadsFew, 2) few_rows(const __grid_constant__ FewArgs g) {
  extern __shared__ __align__(128) char memory[];
  using Entry = typename W::Entry;
  const LinearArgs& a = g.linear;
  const int64_t all = (a.out + kTile - 1) / kTile;
  const int64_t first = all * blockIdx.x / gridDim.x;
  const int tiles = static_cast<int>(all * (blockIdx.x + 1) / gridDim.x - first), rows = static_cast<int>(a.rows);
  Stream<W> stream(g, memory, first, tiles);
#pragma unroll
  for (int s = 0; s < kStages<W>; s++) stream.begin();
  release_next();
  constexpr int kRing = kWarps * kStages<W> * (Stream<W>::kSlot + static_cast<int>(sizeof(uint64_t)));
  auto* units = reinterpret_cast<float*>(memory + kRing);
  const Sums sums{units + 2 * kMostRows + 2 * kWarps, rows};
  auto* x = reinterpret_cast<Entry*>(sums.of(g.most_tiles, 0));
  const int padded = g.pieces * (kPiece / 16) * W::kInputs,
            stride = padded + kRowPadding / static_cast<int>(sizeof(Entry));
  Ending<T> ending;
  const int place = threadIdx.x;
  ending.expect(a, first * kTile, place);
  if constexpr (kCoded) {
    await_previous();
    ending.hear(a);
    enter_codes(a, x, units, stride, padded);
  } else {
    const Entering<T, Entry, kWarps, W::kScaled> entering(a, x, units, units + 2 * kMostRows, stride, padded);
    await_previous();
    ending.hear(a);
    entering.take();
  }

  const int lane = threadIdx.x % 32, row = lane / 4;
  const Entry* heard = x + (row < rows ? row : 0) * stride + lane % 4 * W::kInputs;
  const int words_at = row * kPiece + lane % 4 * 16, scales_at = row * (kScales<W> / 2) + lane % 4;
  Turn turn;
  turn.settle(g.pieces);
  int slot = 0;
  uint32_t parity = 0;
  for (int done = 0; done < tiles; done += g.most_tiles) {
    const int until = min(done + g.most_tiles, tiles);
    if (done > 0) ending = Ending<T>(), ending.expect(a, (first + done) * kTile, place), ending.hear(a);
    while (turn.tile < until) {
      float mine[4] = {};
      for (; turn.piece < g.pieces; turn.piece += kWarps) {
        copies_await(stream.barriers + slot, parity);
        const char* words = stream.ring + slot * Stream<W>::kSlot + words_at;
        const Half* scales = stream.scales(slot) + scales_at;
        const Entry* at = heard + turn.piece * (kPiece / 16) * W::kInputs;
#pragma unroll
        for (int part = 0; part < kPiece / 64; part++) {
          Half upper{}, lower{};
          if constexpr (W::kScaled) upper = scales[4 * part], lower = scales[4 * kScales<W> + 4 * part];
          W::add(mine, *reinterpret_cast<const uint4*>(words + 64 * part),
                 *reinterpret_cast<const uint4*>(words + 8 * kPiece + 64 * part), upper, lower,
                 at + 4 * part * W::kInputs, row < rows);
        }
        __syncwarp();
        if (++slot == kStages<W>) slot = 0, parity ^= 1;
        stream.begin();
      }
      sums.keep(turn.tile - done, mine);
      turn.settle(g.pieces);
    }
    __syncthreads();
    if (place < (until - done) * kTile * rows) ending.say(a, sums.total(place, g.pieces, done), units);
    if (until < tiles) __syncthreads();
  }
}

inline int64_t few_blocks(const LinearArgs& a) {
  const int64_t tiles = (a.out + kTile - 1) / kTile;
  return tiles < gpu().processors ? tiles : gpu().processors;
}

// Tiles whose sums are held at once: a thread for each output and row.
inline int tiles_at_once(const LinearArgs& a) {
  const int64_t most = kThreadsFew / (kTile * a.rows), blocks = few_blocks(a);
  const int64_t each = ((a.out + kTile - 1) / kTile + blocks - 1) / blocks;
  return static_cast<int>(each < most ? each : most);
}

template <typename W>
FewArgs few_args(const LinearArgs& a) {
  FewArgs g{a, static_cast<int>(a.width / W::kInputs * 16), 0, tiles_at_once(a)};
  g.pieces = (g.row_bytes + kPiece - 1) / kPiece;
  return g;
}

template <typename W>
size_t few_shared(const LinearArgs& a) {
  const FewArgs g = few_args<W>(a);
  const size_t entries = static_cast<size_t>(g.pieces) * (kPiece / 16) * W::kInputs;
  return kWarps * kStages<W> * (Stream<W>::kSlot + sizeof(uint64_t)) +
         4 * (2 * kMostRows + 2 * kWarps + g.most_tiles * kWarps * kTile * a.rows) +
         a.rows * (entries * sizeof(typename W::Entry) + kRowPadding);
}

// Whether the rows are few enough, and sizes and addresses those of 16-byte vectors.
template <typename W>
bool few_serves(const LinearArgs& a) {
  return a.rows <= kMostRows && a.width % (W::kScaled ? 256 : 16) == 0 && stream_serves(a, few_shared<W>(a));
}

template <typename W, typename T>
const char* launch_few(const LinearArgs& a, void* stream) {
  const dim3 grid(static_cast<unsigned>(few_blocks(a)));
  auto kernel = few_rows<W, T, false>;
  if constexpr (std::is_same_v<W, Eight>)
    if (a.x_unit) kernel = few_rows<W, T, true>;
  return launch(kernel, grid, dim3(kThreadsFew), few_shared<W>(a), stream, few_args<W>(a));
}

}  // namespace lhcompile
