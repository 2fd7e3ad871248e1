// Sample on a GPU: a block for each row; where there are few, several look for its largest logit. Nothing is sorted:
// the logit at which the most likely tokens end is found digit by digit, from histograms of counts (top_k) or of
// probability (top_p).
//
// Weights exp((logit − largest) / temperature) are kept in whole numbers of 2^−44, so their sums do not depend on the
// order in which they are added.
#include <cooperative_groups.h>

#include "cuda.h"
#include "device.cuh"

namespace lhcompile {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kMostParts = 8;   // of a row; the blocks of a cluster
constexpr int64_t kFewRows = 32;
constexpr int kBuckets = 2048;  // of one digit of 11 bits
using Mass = unsigned long long;

// Numbers in the order of the floats they come from; −0 and 0 are one.
__device__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x == 0.0f ? 0.0f : x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ float value_of(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

template <typename T>
struct Row {
  const T* logits;
  int vocab;
  float largest, temperature;

  __device__ uint32_t key(int id) const { return key_of(widen(logits[id])); }
  __device__ Mass weight(uint32_t key) const {
    return __float2ull_rn(expf((value_of(key) - largest) / temperature) * 0x1p44f);
  }
};

// Calls work(id, numbers) for all logits of the row, or of part `part` of `parts` of it, each once, in one thread or
// another: a vector of 16 bytes, of which kTogether are read at once, or a single number, from token `id` on.
template <int kTogether = 1, typename T, typename F>
__device__ void for_each_vector(const Row<T>& row, const F& work, int part = 0, int parts = 1) {
  constexpr int kCount = 16 / sizeof(T);
  int rest = 0;
  const int first = part * kThreads + static_cast<int>(threadIdx.x), step = parts * kThreads;
  if (reinterpret_cast<uintptr_t>(row.logits) % 16 == 0) {
    rest = row.vocab / kCount * kCount;
#pragma unroll kTogether
    for (int base = first * kCount; base < rest; base += step * kCount) work(base, fetch<T, kCount>(row.logits + base));
  }
#pragma unroll 4
  for (int id = rest + first; id < row.vocab; id += step) work(id, fetch<T, 1>(row.logits + id));
}

// Calls work(id, key) for every token of the row, once, in one thread or another.
template <typename T, typename F>
__device__ void for_each(const Row<T>& row, const F& work) {
  for_each_vector(row, [&](int base, const auto& all) {
    constexpr int kCount = sizeof(all) / sizeof(T);
#pragma unroll
    for (int j = 0; j < kCount; j++) work(base + j, key_of(widen(all.element[j])));
  });
}

// Tokens that stay: those with a larger key, and of those with this key the first `equal` by id.
struct Edge {
  uint32_t key;
  Mass equal;
};

// Of logits: NaN is above all numbers.
struct Best {
  float logit;
  int id;
};

struct Shared {
  uint32_t low[kBuckets], high[kBuckets];  // a bucket's sum in halves: only those have an atomic addition
  Mass sums[kWarps];
  float largest[kWarps];
  int counts[kWarps];
  int first;
  Best of_parts[kMostParts];
  uint32_t digit;
  Mass above;
};

__device__ void add_to_bucket(Shared& s, int bucket, Mass x) {
  const auto low = static_cast<uint32_t>(x);
  const uint32_t old = atomicAdd(&s.low[bucket], low);
  const uint32_t high = static_cast<uint32_t>(x >> 32) + (old + low < old);
  if (high) atomicAdd(&s.high[bucket], high);
}
__device__ Mass bucket_sum(const Shared& s, int bucket) {
  return static_cast<Mass>(s.high[bucket]) << 32 | s.low[bucket];
}

__device__ Mass block_sum(Shared& s, Mass x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  __syncthreads();
  if (threadIdx.x % 32 == 0) s.sums[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (int w = 0; w < kWarps; w++) x += s.sums[w];
  return x;
}

__device__ float larger(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}
__device__ bool is_same(float x, float y) { return x == y || (isnan(x) && isnan(y)); }

// Numbers of 16 bits are compared in pairs.
template <typename T, int N>
__device__ float largest_of(const Vector<T, N>& all) {
  if constexpr (sizeof(T) == 2 && N == 8) {
    std::conditional_t<std::is_same_v<T, Half>, __half2, __nv_bfloat162> pairs[4];
    memcpy(pairs, &all, sizeof(pairs));
    const auto both = __hmax2_nan(__hmax2_nan(pairs[0], pairs[1]), __hmax2_nan(pairs[2], pairs[3]));
    return larger(widen(both.x), widen(both.y));
  } else {
    float largest = widen(all.element[0]);
#pragma unroll
    for (int j = 1; j < N; j++) largest = larger(largest, widen(all.element[j]));
    return largest;
  }
}

__device__ float warp_largest(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = larger(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// The largest logit, of equals the first: in part 0 of the whole row, elsewhere of the part; id `vocab` if it has none.
// Whoever has met it looks for its place once it is known.
template <typename T>
__device__ Best most_likely(Shared& s, const Row<T>& row, int part, int parts) {
  constexpr int kCount = 16 / sizeof(T);
  float mine = -INFINITY;
  int place = row.vocab;  // where the vector begins in which it was met first
  auto meet = [&](int base, const auto& all) {
    const float next = larger(mine, largest_of(all));
    if (place == row.vocab || !is_same(next, mine)) mine = next, place = base;
  };
  for_each_vector<4>(row, meet, part, parts);
  const float of_warp = warp_largest(mine);
  if (threadIdx.x % 32 == 0) s.largest[threadIdx.x / 32] = of_warp;
  if (threadIdx.x == 0) s.first = row.vocab;
  __syncthreads();
  static_assert(kWarps == 32, "a number for each lane");
  Best best{warp_largest(s.largest[threadIdx.x % 32]), row.vocab};
  if (is_same(mine, best.logit)) {
#pragma unroll
    for (int j = kCount - 1; j >= 0; j--)
      if (place + j < row.vocab && is_same(widen(row.logits[place + j]), best.logit)) best.id = place + j;
    atomicMin(&s.first, best.id);
  }
  __syncthreads();
  best.id = s.first;
  if (parts == 1) return best;
  auto cluster = cooperative_groups::this_cluster();
  if (threadIdx.x == 0) *cluster.map_shared_rank(&s.of_parts[part], 0) = best;
  cluster.sync();
  if (part > 0) return best;
  for (int p = 1; p < parts; p++) {
    const Best other = s.of_parts[p];
    if (is_same(other.logit, best.logit)) {
      best.id = min(best.id, other.id);
    } else if (is_same(larger(best.logit, other.logit), other.logit)) {
      best = other;
    }
  }
  return best;
}

// The largest digit whose bucket, with all above it, holds more than `wanted` − 1; sums of `above` it are left in s.
__device__ void find_bucket(Shared& s, Mass wanted) {
  constexpr int kEach = kBuckets / kThreads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int top = kBuckets - 1 - static_cast<int>(threadIdx.x) * kEach;  // a thread's buckets go down from here
  Mass mine = 0;
  for (int j = 0; j < kEach; j++) mine += bucket_sum(s, top - j);
  Mass scan = mine;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Mass other = __shfl_up_sync(~0u, scan, step);
    if (lane >= step) scan += other;
  }
  if (lane == 31) s.sums[warp] = scan;
  __syncthreads();
  Mass before = scan - mine;
  for (int w = 0; w < warp; w++) before += s.sums[w];
  for (int j = 0; j < kEach; j++) {
    const Mass here = bucket_sum(s, top - j);
    if (before < wanted && wanted <= before + here) s.digit = top - j, s.above = before;
    before += here;
  }
  __syncthreads();
}

// The key at which the sum over tokens, from the most likely one down, reaches `wanted` ≥ 1; `measure(key, id)` is what
// a token adds. → the key, and what is above it
template <typename T, typename F>
__device__ uint32_t edge_key(Shared& s, const Row<T>& row, Mass wanted, Mass& above, const F& measure) {
  uint32_t found = 0;
  above = 0;
  constexpr int kShifts[] = {21, 10, 0}, kBits[] = {11, 11, 10};
#pragma unroll
  for (int digit = 0; digit < 3; digit++) {
    const int shift = kShifts[digit];
    for (int i = threadIdx.x; i < kBuckets; i += kThreads) s.low[i] = s.high[i] = 0;
    __syncthreads();
    for_each(row, [&](int, uint32_t key) {
      if (digit > 0 && key >> (shift + kBits[digit]) != found >> (shift + kBits[digit])) return;
      const Mass adds = measure(key);
      if (adds) add_to_bucket(s, static_cast<int>(key >> shift & ((1u << kBits[digit]) - 1)), adds);
    });
    __syncthreads();
    find_bucket(s, wanted - above);
    found |= s.digit << shift;
    above += s.above;
    __syncthreads();
  }
  return found;
}

// Ids [begin, end) that hold the token sought. `before`: the weights of what lies in front of them; `left`: how many
// tokens at the edge may still stay.
struct Stretch {
  int begin, end;
  Mass before;
  long long left;
};

// The part of a stretch, one of as many as there are warps, that holds the token.
template <typename T>
__device__ Stretch part_of(Shared& s, const Row<T>& row, const Edge& edge, Mass at_edge, Mass target, Stretch at) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int each = (at.end - at.begin + kThreads - 1) / kThreads * 32;
  const int begin = min(at.begin + warp * each, at.end), end = min(begin + each, at.end);
  Mass mine = 0;
  int equal = 0;
#pragma unroll 8
  for (int id = begin + lane; id < end; id += 32) {
    const uint32_t key = row.key(id);
    mine += key > edge.key ? row.weight(key) : 0;
    equal += key == edge.key;
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    mine += __shfl_xor_sync(~0u, mine, step);
    equal += __shfl_xor_sync(~0u, equal, step);
  }
  __syncthreads();
  if (lane == 0) s.sums[warp] = mine, s.counts[warp] = equal;
  __syncthreads();
  int chosen = 0;
  for (; at.begin + (chosen + 1) * each < at.end; chosen++) {
    const long long stay = min(at.left, static_cast<long long>(s.counts[chosen]));
    const Mass here = s.sums[chosen] + static_cast<Mass>(stay) * at_edge;
    if (target < at.before + here) break;
    at.before += here, at.left -= stay;
  }
  at.begin += chosen * each;
  at.end = min(at.begin + each, at.end);
  return at;
}

// The token whose stretch of the cumulative weights, in the order of ids, holds uniform · total; in the first warp.
template <typename T>
__device__ int draw(Shared& s, const Row<T>& row, const Edge& edge, Mass total, float uniform) {
  const int lane = threadIdx.x % 32;
  const Mass at_edge = row.weight(edge.key);
  Mass target = static_cast<Mass>(static_cast<double>(uniform) * static_cast<double>(total));
  if (target >= total) target = total - 1;
  Stretch at{0, row.vocab, 0, static_cast<long long>(edge.equal)};
  at = part_of(s, row, edge, at_edge, target, at);
  at = part_of(s, row, edge, at_edge, target, at);
  int last = 0;
  for (int base = at.begin; base < at.end; base += 32) {
    const int id = base + lane;
    const uint32_t key = id < at.end ? row.key(id) : 0;
    const bool ties = id < at.end && key == edge.key;
    const unsigned tied = __ballot_sync(~0u, ties);
    const bool stays = (id < at.end && key > edge.key) || (ties && __popc(tied & ((1u << lane) - 1)) < at.left);
    const Mass weight = stays ? row.weight(key) : 0;
    Mass scan = weight;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const Mass other = __shfl_up_sync(~0u, scan, step);
      if (lane >= step) scan += other;
    }
    const unsigned reached = __ballot_sync(~0u, weight > 0 && target < at.before + scan);
    if (reached) return base + __ffs(reached) - 1;
    const unsigned possible = __ballot_sync(~0u, weight > 0);
    if (possible) last = base + 31 - __clz(possible);
    at.before += __shfl_sync(~0u, scan, 31);
    at.left = max(at.left - __popc(tied), 0LL);
  }
  return last;
}

template <typename T, int kParts>
__global__ void __cluster_dims__(kParts, 1, 1) __launch_bounds__(kThreads, kParts > 1 ? 1 : 2)
    sample(const __grid_constant__ SampleArgs a) {
  __shared__ Shared s;
  release_next();
  if (kParts > 1) cooperative_groups::this_cluster().sync();  // all its blocks are there, and their memory
  await_previous();
  const int part = blockIdx.x % kParts;
  const int at = kParts > 1 ? blockIdx.x / kParts : gridDim.x - 1 - blockIdx.x;  // the last logits are in the cache yet
  Row<T> row{static_cast<const T*>(a.logits) + at * a.vocab, static_cast<int>(a.vocab), 0.0f, a.temperature[at]};
  const Best best = most_likely(s, row, part, kParts);
  if (part > 0) return;
  if (row.temperature == 0.0f) {
    if (threadIdx.x == 0) a.tokens[at] = best.id;
    return;
  }
  row.largest = best.logit;

  Edge edge{0, 0};  // every key is larger
  if (a.top_k[at] > 0 && a.top_k[at] < a.vocab) {
    const auto most = static_cast<Mass>(a.top_k[at]);
    Mass above;
    edge.key = edge_key(s, row, most, above, [](uint32_t) { return Mass{1}; });
    edge.equal = most - above;
  }
  auto kept = [&](uint32_t key) { return key > edge.key ? row.weight(key) : Mass{0}; };
  Mass total = 0;
  for_each(row, [&](int, uint32_t key) { total += kept(key); });
  const Mass at_edge = edge.equal ? row.weight(edge.key) : 0;
  total = block_sum(s, total) + edge.equal * at_edge;
  if (a.top_p[at] < 1.0f) {
    Mass wanted = static_cast<Mass>(ceil(static_cast<double>(a.top_p[at]) * static_cast<double>(total)));
    if (wanted < 1) wanted = 1;
    Mass above = total - edge.equal * at_edge;  // of what is larger than the edge of top_k
    Edge nucleus = edge;
    if (wanted <= above) nucleus.key = edge_key(s, row, wanted, above, kept);
    const Mass each = row.weight(nucleus.key);
    Mass count = each ? (wanted - above + each - 1) / each : edge.equal;
    if (nucleus.key == edge.key && count > edge.equal) count = edge.equal;
    nucleus.equal = count;
    total = above + count * each;
    edge = nucleus;
  }
  const int token = draw(s, row, edge, total, a.uniform[at]);
  if (threadIdx.x == 0) a.tokens[at] = token;
}

template <typename T>
const char* launch_sample(const SampleArgs& a, void* stream) {
  const bool few = a.batch <= kFewRows;
  const dim3 grid(static_cast<unsigned>(a.batch * (few ? kMostParts : 1)));
  return launch(few ? sample<T, kMostParts> : sample<T, 1>, grid, dim3(kThreads), 0, stream, a);
}

}  // namespace

const char* sample_cuda(const SampleArgs& a, void* stream) {
  if (a.signal == Type::f16) return launch_sample<Half>(a, stream);
  if (a.signal == Type::bf16) return launch_sample<Brain>(a, stream);
  return launch_sample<float>(a, stream);
}

}  // namespace lhcompile
