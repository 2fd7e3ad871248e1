// The product of some tens of rows, for all of which the weight is read once; of 4 bits for every 32 of them.
//
// A cluster of blocks has tiles of 64 outputs, one after the other, and each of its blocks a part of the inputs, of which
// all rows of x stay in its shared memory. One thread brings pieces of the weight, 64 outputs of 128 bytes, into a ring:
// the first of them before the kernel in front has ended, for they are constants. Four warps multiply, and send what they
// have of each output to the block that adds it up over the cluster; there four other warps do so, in one order.
#include "pieces.cuh"

namespace lhcompile {
namespace {

constexpr int kThreads = 2 * kGroup + 32;  // those that multiply, those that add, and the one that brings
constexpr int kFewestSlots = 4, kMostSlots = 16;

// Two numbers to a block of the cluster, where the barrier counts their bytes.
__device__ inline void send(uint32_t to, float x, float y, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to), "f"(x),
               "f"(y), "r"(barrier)
               : "memory");
}
__device__ inline void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// How the work is divided: blocks of a cluster, clusters; of a block: pieces of the inputs, slots of its ring.
struct Division {
  int split, clusters, pieces, slots;
};

struct Maps {
  CUtensorMap x, weight, scales;
};

template <typename W, int N>
struct Shared {
  static constexpr int kX = W::kBoxes * N * kBoxBytes;  // beside a piece of the weight
  static constexpr int kPitch = N + 2, kSums = kOutputs * kPitch;  // from output to output, and of a tile
  char *ring, *x;
  float* sums;  // of two tiles, from each block of the cluster its sums of the outputs that are added here
  uint64_t *full, *empty, *summed, *added;  // barriers: of slots, and of the sums of two tiles
  __device__ Shared(char* memory, const Division& d) : ring(memory + (1024 - shared_address(memory) % 1024) % 1024) {
    x = ring + d.slots * W::kSlot;
    sums = reinterpret_cast<float*>(x + d.pieces * kX);
    full = reinterpret_cast<uint64_t*>(sums + 2 * kSums);
    empty = full + kMostSlots, summed = empty + kMostSlots, added = summed + 2;
  }
  static int bytes(int pieces, int slots) {
    return 1024 + slots * W::kSlot + pieces * kX + 2 * kSums * 4 + (2 * kMostSlots + 4) * 8;
  }
};

__host__ __device__ inline int tiles_of(const LinearArgs& a) {
  return static_cast<int>((a.out + kOutputs - 1) / kOutputs);
}

template <typename W>
__host__ __device__ int pieces_of(const LinearArgs& a) {
  return static_cast<int>((a.width + W::kInputs - 1) / W::kInputs);
}

// A block's part of the inputs, in pieces, and its cluster's tiles.
struct Part {
  int first, pieces, tile, tiles, step;
  __device__ Part(const LinearArgs& a, int all, const Division& d) {
    first = min(static_cast<int>(rank_in_cluster()) * d.pieces, all), pieces = min(d.pieces, all - first);
    tile = blockIdx.x / d.split, step = d.clusters, tiles = tiles_of(a);
  }
};

// Of the pieces of the weight that a block multiplies, one after the other, and their slots.
struct Turn {
  const Part& part;
  int slots, tile = part.tile, piece = 0, slot = 0;
  uint32_t round = 0;
  __device__ Turn(const Part& part_, int slots_) : part(part_), slots(slots_) {}
  __device__ bool is_there() const { return tile < part.tiles && part.pieces > 0; }
  __device__ void next() {
    if (++piece == part.pieces) piece = 0, tile += part.step;
    if (++slot == slots) slot = 0, round++;
  }
};

// Brings pieces of the weight, and with those of the first tile pieces of x, which then stay.
template <typename W, int N>
struct Bringer {
  const Maps& maps;
  const Shared<W, N>& shared;
  const Part& part;
  Turn turn;
  __device__ Bringer(const Maps& maps_, const Shared<W, N>& shared_, const Part& part_, const Division& d)
      : maps(maps_), shared(shared_), part(part_), turn(part_, d.slots) {}
  __device__ bool is_first() const { return turn.tile == part.tile; }
  __device__ void weight() const {
    uint64_t* full = shared.full + turn.slot;
    char* slot = shared.ring + turn.slot * W::kSlot;
    copies_expect(full, W::kSlot + (is_first() ? shared.kX : 0));
    const int piece = part.first + turn.piece, output = turn.tile * kOutputs;
    bring_weight(slot, maps.weight, piece * kBoxBytes, output, full);
    if (W::kScales) bring_weight(slot + kBox, maps.scales, piece * W::kScales, output, full);
  }
  // Beside up to 16 rows, weights go out of the cache first; beside more, that has cost a percent.
  __device__ static void bring_weight(void* to, const CUtensorMap& map, int column, int row, uint64_t* barrier) {
    if constexpr (N == 16)
      bring(to, map, column, row, barrier, first_out());
    else
      bring(to, map, column, row, barrier);
  }
  __device__ void x(int piece, int slot) const {
#pragma unroll
    for (int box = 0; box < W::kBoxes; box++)
      bring(shared.x + piece * shared.kX + box * N * kBoxBytes, maps.x,
            ((part.first + piece) * W::kBoxes + box) * kBoxBytes, 0, shared.full + slot);
  }
  // The weight alone, until the ring is full.
  __device__ void begin() {
    for (; turn.is_there() && turn.round == 0; turn.next()) weight();
  }
  __device__ void go_on(int slots) {
    for (int piece = 0; piece < min(part.pieces, slots); piece++) x(piece, piece);
    for (; turn.is_there(); turn.next()) {
      copies_await(shared.empty + turn.slot, turn.round - 1 & 1);
      weight();
      if (is_first()) x(turn.piece, turn.slot);
    }
  }
};

template <typename W, int N>
__device__ inline void multiply_pieces(const Shared<W, N>& shared, const Part& part, const Division& d) {
  using S = Shared<W, N>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, mine = static_cast<int>(rank_in_cluster());
  int slot = 0, turn = 0;
  uint32_t parity = 0;
  for (int tile = part.tile; tile < part.tiles; tile += part.step, turn++) {
    float sums[N / 2] = {};
    int before = -1;
    for (int piece = 0; piece < part.pieces; piece++) {
      copies_await(shared.full + slot, parity);
      W::multiply_piece(sums, shared.ring + slot * W::kSlot, shared.x + piece * S::kX);
      if constexpr (W::kHeld) {  // in registers: the warp has read all of it
        __syncwarp();
        if (lane == 0) arrive(shared.empty + slot);
      } else {
        if (before >= 0 && threadIdx.x == 0) arrive(shared.empty + before);
        before = slot;
      }
      if (++slot == d.slots) slot = 0, parity ^= 1;
    }
    multiply_await<0>(sums);
    if (before >= 0 && threadIdx.x == 0) arrive(shared.empty + before);
    const int half = turn % 2, each = kOutputs / d.split;
    if (turn > 1) cluster_await_at(shared.added + half, turn / 2 - 1 & 1);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int output = 16 * warp + lane / 4 + 8 * i, rank = output / each;
      const int place = half * S::kSums + (mine * each + output % each) * S::kPitch + lane % 4 * 2;
      const uint32_t to = there(shared.sums + place, rank), barrier = there(shared.summed + half, rank);
#pragma unroll
      for (int j = 0; j < N / 8; j++) send(to + 32 * j, sums[4 * j + 2 * i], sums[4 * j + 2 * i + 1], barrier);
    }
  }
}

// Four neighbouring outputs of a row, and what is added to their sums.
template <typename W, typename T>
struct Quad {
  int64_t row, output;
  bool is_there;
  float carried[4] = {}, bias[4] = {}, unit[4];
  __device__ Quad(const LinearArgs& a, int row_, int64_t output_)
      : row(row_), output(output_), is_there(row < a.rows && output < a.out) {
    if (!is_there) return;
    if (a.residual) load<T, 4>(static_cast<const T*>(a.residual) + row * a.out + output, carried);
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (a.bias) bias[j] = load_any(a.bias, a.bias_type, output + j);
    if constexpr (W::kCoded) {
      load_floats(static_cast<const float*>(a.weight_scale) + output, unit);
#pragma unroll
      for (float& each : unit) each *= a.x_unit[row];
    }
  }
  __device__ void write(const LinearArgs& a, float (&y)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if constexpr (W::kCoded) y[j] *= unit[j];
      y[j] = activated(a.activation, y[j] + bias[j]) + carried[j];
    }
    if (!a.y_unit) return store<T, 4>(y, static_cast<T*>(a.y) + row * a.out + output);
    Vector<uint8_t, 4> codes;
#pragma unroll
    for (int j = 0; j < 4; j++) codes.element[j] = to_eight(y[j] / a.y_unit[row]);
    put(codes, static_cast<uint8_t*>(a.y) + row * a.out + output);
  }
};

template <typename W, typename T, int N>
__device__ inline void add_up(const LinearArgs& a, const Shared<W, N>& shared, const Part& part, int split) {
  using S = Shared<W, N>;
  const int each = kOutputs / split, lane = threadIdx.x % kGroup, first = static_cast<int>(rank_in_cluster()) * each;
  int turn = 0;
  for (int tile = part.tile; tile < part.tiles; tile += part.step, turn++) {
    const int half = turn % 2;
    const float* sums = shared.sums + half * S::kSums;
    for (int task = lane; task < N * each / 4; task += kGroup) {
      const int row = task / (each / 4), column = task % (each / 4) * 4;
      const Quad<W, T> quad(a, row, static_cast<int64_t>(tile) * kOutputs + first + column);
      if (task == lane) cluster_await_at(shared.summed + half, turn / 2 & 1);
      if (!quad.is_there) continue;
      float y[4] = {};
      for (int from = 0; from < split; from++)
#pragma unroll
        for (int j = 0; j < 4; j++) y[j] += sums[(from * each + column + j) * S::kPitch + row];
      quad.write(a, y);
    }
    if (tile + 2 * part.step >= part.tiles) continue;  // nobody waits to send more
    __syncwarp();
    group_meets(1);
    if (lane == 0) copies_expect(shared.summed + half, kOutputs * N * 4);
    if (lane < split) cluster_arrive_at(there(shared.added + half, lane));
  }
}

template <typename W, typename T, int N>
__global__ void __launch_bounds__(kThreads)
    tens(const __grid_constant__ LinearArgs a, const __grid_constant__ Maps maps, const __grid_constant__ Division d) {
  extern __shared__ char memory[];
  const Shared<W, N> shared(memory, d);
  if (threadIdx.x == 0) {
    for (int s = 0; s < d.slots; s++) {
      barrier_begin(shared.full + s);
      barrier_begin(shared.empty + s, W::kHeld ? kGroup / 32 : 1);
    }
    for (int half = 0; half < 2; half++) {
      barrier_begin(shared.summed + half);
      barrier_begin(shared.added + half, d.split);
    }
    barriers_begun();
    for (int half = 0; half < 2; half++) copies_expect(shared.summed + half, kOutputs * N * 4);
  }
  release_next();
  __syncthreads();
  cluster_arrive();
  const Part part(a, pieces_of<W>(a), d);
  const bool brings = threadIdx.x == 2 * kGroup;
  Bringer<W, N> bringer(maps, shared, part, d);
  if (brings) bringer.begin();
  __syncwarp();
  cluster_await();  // the barriers of all blocks have begun
  await_previous();
  if (brings) bringer.go_on(d.slots);
  if (threadIdx.x < kGroup) multiply_pieces(shared, part, d);
  if (threadIdx.x / kGroup == 1) add_up<W, T>(a, shared, part, d.split);  // until all has come that others send
}

// The smallest clusters that occupy most multiprocessors, if they can be such that two blocks fit on one, where one
// begins while one ends. `split` is 0 where there are none.
template <typename W, int N>
Division division_of(const LinearArgs& a) {
  const int all = pieces_of<W>(a), tiles = tiles_of(a), processors = gpu().processors;
  constexpr int kTogether = 16;  // multiprocessors of each group of them that clusters of four or eight can have
  for (int room : {(gpu().shared + 1024) / 2 - 1024, gpu().shared})
    for (int split : {2, 4, 8}) {
      if (split < 8 && 4 * tiles * split < 3 * processors) continue;
      const int pieces = (all + split - 1) / split, slots = (room - Shared<W, N>::bytes(pieces, 0)) / W::kSlot;
      const int most = (split > 2 ? processors / kTogether * kTogether : processors) / split;
      if (slots < kFewestSlots || most == 0) continue;
      return {split, most < tiles ? most : tiles, pieces, slots < kMostSlots ? slots : kMostSlots};
    }
  return {};
}

template <typename W, typename T, int N>
const char* launch_tens(const LinearArgs& a, void* stream) {
  const Division d = division_of<W, N>(a);
  Maps maps{};
  if (!map_of(a.x, a.rows, a.width * sizeof(typename W::Entry), N, &maps.x) ||
      !map_of(a.weight, a.out, a.width * kBoxBytes / W::kInputs, kOutputs, &maps.weight) ||
      (W::kScales &&
       !map_of(a.weight_scale, a.out, a.width * W::kScales / W::kInputs, kOutputs, &maps.scales, W::kScales)))
    return "a matrix cannot be described to the GPU";
  const dim3 grid(static_cast<unsigned>(d.split * d.clusters));
  const auto shared = static_cast<size_t>(Shared<W, N>::bytes(d.pieces, d.slots));
  return launch_clusters(d.split, tens<W, T, N>, grid, dim3(kThreads), shared, stream, a, maps, d);
}

// f(the fewest rows of a tile that suffice, as a constant)
template <typename W, typename F>
auto with_rows(const LinearArgs& a, const F& f) {
  if (a.rows <= 16) return f(std::integral_constant<int, 16>());
  if constexpr (W::kCoded)
    if (a.rows > 32) return f(std::integral_constant<int, 64>());
  return f(std::integral_constant<int, 32>());
}

// Rows that are multiplied at once, and in all of 4 bits: to read those three times takes less than to write them out
// for cuBLASLt.
template <typename W>
constexpr int kMostAtOnce = W::kCoded ? 64 : 32;
constexpr int kMostOfFour = 96;

// Whether nothing else is faster. Beyond 16 rows of 16 bits it is where x needs no clusters of eight, beyond 32 of codes
// in 8 bits where tiles do not occupy the multiprocessors.
template <typename W>
bool is_best(const LinearArgs& a) {
  if (a.rows > (W::kScales ? kMostOfFour : kMostAtOnce<W>)) return false;
  const int split = with_rows<W>(a, [&](auto rows) { return division_of<W, decltype(rows)::value>(a).split; });
  if (split == 0 || a.rows <= 16 || W::kScales) return split > 0;
  return W::kCoded ? a.rows <= 32 || 2 * tiles_of(a) <= gpu().processors : split < 8;
}

template <typename W, typename T>
const char* launch_rows(const LinearArgs& a, void* stream) {
  return with_rows<W>(a, [&](auto rows) { return launch_tens<W, T, decltype(rows)::value>(a, stream); });
}

// Rows in parts of as many as are multiplied at once.
const char* four_cuda(LinearArgs a, void* stream) {
  for (int64_t left = a.rows; left > 0; left -= a.rows) {
    a.rows = left < kMostAtOnce<FourBits> ? left : kMostAtOnce<FourBits>;
    if (const char* problem = launch_rows<FourBits, Half>(a, stream)) return problem;
    a.x = static_cast<const Half*>(a.x) + a.rows * a.width, a.y = static_cast<Half*>(a.y) + a.rows * a.out;
    if (a.residual) a.residual = static_cast<const Half*>(a.residual) + a.rows * a.out;
  }
  return nullptr;
}

}  // namespace

bool tens_serves(const LinearArgs& a) {
  auto even = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; };
  if (!has_instructions() || a.out % 4) return false;
  if (!even(a.x) || !even(a.weight) || !even(a.residual) || !even(a.y) || !even(a.weight_scale)) return false;
  if (a.weight_type == Type::u8)
    return a.signal == Type::f16 && a.width % FourBits::kInputs == 0 && is_best<FourBits>(a);
  if (a.weight_type == Type::e4m3) return a.width % 16 == 0 && is_best<EightBits>(a);
  return a.width % 8 == 0 && a.signal != Type::f32 && a.weight_type == a.signal && is_best<Whole<Half>>(a);
}

const char* tens_cuda(const LinearArgs& a, void* stream) {
  if (a.weight_type == Type::f16) return launch_rows<Whole<Half>, Half>(a, stream);
  if (a.weight_type == Type::bf16) return launch_rows<Whole<Brain>, Brain>(a, stream);
  if (a.weight_type == Type::u8) return four_cuda(a, stream);
  if (a.signal == Type::f16) return launch_rows<EightBits, Half>(a, stream);
  if (a.signal == Type::bf16) return launch_rows<EightBits, Brain>(a, stream);
  return launch_rows<EightBits, float>(a, stream);
}

}  // namespace lhcompile
