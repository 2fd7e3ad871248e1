// The product of many rows in 8 bits, activated and written in 8 bits.
//
// A block has tiles of 128 rows × 256 outputs, one after the other. One thread brings pieces of 128 inputs of both
// factors into a ring in shared memory; two groups of four warps multiply them, 64 rows each, sums in registers. Two
// blocks that are a cluster have the same outputs and neighbouring rows, and each brings half of the weights for both.
#include "tensor.cuh"

namespace lhcompile {
namespace {

constexpr int kRows = 128, kOutputs = 256, kInputs = kBoxBytes, kStages = 4, kCluster = 2;
constexpr int kGroups = 2, kThreads = kGroup * (kGroups + 1);
constexpr int kRowBytes = kRows * kInputs, kWeightBytes = kOutputs * kInputs, kStage = kRowBytes + kWeightBytes;
constexpr int kHalf = kOutputs / 2, kPitch = kHalf + 16;  // codes of a row that a warp gathers at once, and padding
constexpr int kGathered = kGroup / 32 * 16 * kPitch, kColumns = kOutputs * 8;  // of a group
constexpr int kShared = 1024 + kStages * kStage + kGroups * (kGathered + kColumns) + 2 * kStages * 8;

// A box for all blocks of the cluster, to the same place in each.
__device__ inline void bring_all(void* to, const CUtensorMap& map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)),
      "h"(static_cast<uint16_t>((1 << kCluster) - 1))
      : "memory");
}

// sums += 64 rows × 256 outputs over 32 inputs, or = where `first`.
__device__ inline void multiply(float (&sums)[128], uint64_t x, uint64_t weight, bool first) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.eq.b32 add, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
      "}, %128, %129, add, 1, 1;\n"
      "}\n"
      : LHC_32(sums, 0), LHC_32(sums, 32), LHC_32(sums, 64), LHC_32(sums, 96)
      : "l"(x), "l"(weight), "r"(static_cast<int>(first)));
}
// Until all but the last `kLeft` that were committed are done.
template <int kLeft>
__device__ inline void multiply_await(float (&sums)[128]) {
  asm volatile("wgmma.wait_group.sync.aligned %128;"
               : LHC_32(sums, 0), LHC_32(sums, 32), LHC_32(sums, 64), LHC_32(sums, 96)
               : "n"(kLeft)
               : "memory");
}

// The tiles of a block, in an order in which those that run at once share rows and outputs.
struct Tiles {
  int deep, across, count, first, step;  // deep: clusters' rows, across: outputs, both in tiles
  __device__ explicit Tiles(const LinearArgs& a)
      : deep(static_cast<int>((a.rows + kCluster * kRows - 1) / (kCluster * kRows))),
        across(static_cast<int>((a.out + kOutputs - 1) / kOutputs)),
        count(deep * across),
        first(blockIdx.x / kCluster),
        step(gridDim.x / kCluster) {}
  // Where a tile begins.
  __device__ void at(int number, int& row, int& output) const {
    constexpr int kBand = 8;
    const int band = number / (kBand * across), in_band = number % (kBand * across);
    const int here = min(kBand, deep - band * kBand);
    row = ((band * kBand + in_band % here) * kCluster + static_cast<int>(rank_in_cluster())) * kRows;
    output = in_band / here * kOutputs;
  }
};

// A place in the ring.
struct Slot {
  int at = 0;
  uint32_t parity = 0;
  __device__ void next() {
    if (++at == kStages) at = 0, parity ^= 1;
  }
};

template <Activation kKind>
__device__ inline float acted(float x) {
  if constexpr (kKind != Activation::gelu_tanh) return activated(kKind, x);
  float bent;
  asm("tanh.approx.f32 %0, %1;" : "=f"(bent) : "f"(x * (0.79788456f + 0.0356774081f * x * x)));
  return 0.5f * x + 0.5f * x * bent;
}

// What a thread's two of a warp's 16 rows are multiplied with, and divided by.
struct Units {
  float of_x[2], of_y[2];
  __device__ Units(const LinearArgs& a, int64_t row) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int64_t mine = row + threadIdx.x % 32 / 4 + 8 * i;
      of_x[i] = mine < a.rows ? a.x_unit[mine] : 0.0f, of_y[i] = mine < a.rows ? a.y_unit[mine] : 1.0f;
    }
  }
};

// Sums → codes of a warp's 16 rows, half of the outputs at a time. columns: unit and bias of each output
template <Activation kKind>
__device__ inline void write(const LinearArgs& a, const float (&sums)[128], const Units& units, const float4* columns,
                             char* room, int64_t row, int output) {
  const int lane = threadIdx.x % 32, quad = lane % 4;
  const float by[] = {1.0f / units.of_y[0], 1.0f / units.of_y[1]};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kHalf / 8; j++) {
      const float4 column = columns[(half * kHalf + 8 * j) / 2 + quad];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float* pair = sums + (half * kHalf / 8 + j) * 4 + 2 * i;
        const float2 both{acted<kKind>(pair[0] * units.of_x[i] * column.x + column.y) * by[i],
                          acted<kKind>(pair[1] * units.of_x[i] * column.z + column.w) * by[i]};
        *reinterpret_cast<uint16_t*>(room + (lane / 4 + 8 * i) * kPitch + 8 * j + 2 * quad) =
            __nv_cvt_float2_to_fp8x2(both, __NV_SATFINITE, __NV_E4M3);
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int64_t mine = row + lane / 8 + 4 * i, at = output + half * kHalf + lane % 8 * 16;
      if (mine < a.rows && at < a.out)
        *reinterpret_cast<uint4*>(static_cast<char*>(a.y) + mine * a.out + at) =
            *reinterpret_cast<const uint4*>(room + (lane / 8 + 4 * i) * kPitch + lane % 8 * 16);
    }
  }
}

// What the blocks' threads share.
struct Shared {
  char *ring, *gathered;
  float2* columns;         // of each group: unit and bias of its tile's outputs
  uint64_t *full, *empty;  // barriers of the ring's slots
  __device__ explicit Shared(char* memory) : ring(memory + (1024 - shared_address(memory) % 1024) % 1024) {
    gathered = ring + kStages * kStage;
    columns = reinterpret_cast<float2*>(gathered + kGroups * kGathered);
    full = reinterpret_cast<uint64_t*>(columns + kGroups * kOutputs), empty = full + kStages;
  }
};

// All pieces of all tiles, as slots become free.
__device__ inline void bring_pieces(const LinearArgs& a, const CUtensorMap& rows, const CUtensorMap& weights,
                                    const Shared& shared, const Tiles& tiles, int pieces) {
  const int rank = static_cast<int>(rank_in_cluster());
  Slot slot;
  for (int number = tiles.first; number < tiles.count; number += tiles.step) {
    int row, output;
    tiles.at(number, row, output);
    for (int piece = 0; piece < pieces; piece++, slot.next()) {
      copies_await(shared.empty + slot.at, slot.parity ^ 1);
      copies_expect(shared.full + slot.at, kStage);
      char* to = shared.ring + slot.at * kStage;
      bring(to, rows, piece * kInputs, row, shared.full + slot.at);
      bring_all(to + kRowBytes + rank * (kWeightBytes / kCluster), weights, piece * kInputs,
                output + rank * (kOutputs / kCluster), shared.full + slot.at);
    }
  }
}

// One group's rows of all tiles.
template <Activation kKind>
__device__ inline void multiply_pieces(const LinearArgs& a, const Shared& shared, const Tiles& tiles, int pieces) {
  const int group = threadIdx.x / kGroup, lane = threadIdx.x % kGroup;
  float2* columns = shared.columns + group * kOutputs;
  Slot slot;
  for (int number = tiles.first; number < tiles.count; number += tiles.step) {
    int row, output;
    tiles.at(number, row, output);
    row += threadIdx.x / 32 * 16;
    float2 column[kOutputs / kGroup] = {};  // on its way while there is much to multiply
#pragma unroll
    for (int i = 0; i < kOutputs / kGroup; i++) {
      const int64_t mine = output + lane + i * kGroup;
      if (mine < a.out) column[i].x = static_cast<const float*>(a.weight_scale)[mine];
      if (mine < a.out && a.bias) column[i].y = load_any(a.bias, a.bias_type, mine);
    }
    const Units units(a, row);
    float sums[128];
    int before = 0;
    auto release = [&] {  // a slot, to whoever brings something into it
      if (lane < kCluster) arrive_at(there(shared.empty + before, lane));
    };
    for (int piece = 0; piece < pieces; piece++, slot.next()) {
      copies_await(shared.full + slot.at, slot.parity);
      const char* from = shared.ring + slot.at * kStage;
      const uint64_t x = described(from + group * (kRowBytes / kGroups)), weight = described(from + kRowBytes);
      multiply_begin();
#pragma unroll
      for (int k = 0; k < kInputs / 32; k++) multiply(sums, x + 2 * k, weight + 2 * k, piece == 0 && k == 0);
      multiply_commit();
      multiply_await<1>(sums);
      if (piece > 0) release();
      before = slot.at;
    }
    multiply_await<0>(sums);
    release();
    group_meets(group);  // the columns before were read
#pragma unroll
    for (int i = 0; i < kOutputs / kGroup; i++) columns[lane + i * kGroup] = column[i];
    group_meets(group);
    write<kKind>(a, sums, units, reinterpret_cast<const float4*>(columns),
                 shared.gathered + threadIdx.x / 32 * kGathered / (kGroup / 32), row, output);
  }
}

template <Activation kKind>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 1)
    eight_bits(const __grid_constant__ LinearArgs a, const __grid_constant__ CUtensorMap rows,
               const __grid_constant__ CUtensorMap weights) {
  extern __shared__ char memory[];
  const Shared shared(memory);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; s++)
      barrier_begin(shared.full + s, 1), barrier_begin(shared.empty + s, kGroups * kCluster);
    barriers_begun();
  }
  release_next();
  __syncthreads();
  meet_cluster();
  await_previous();
  const Tiles tiles(a);
  const int pieces = static_cast<int>((a.width + kInputs - 1) / kInputs);
  if (threadIdx.x / kGroup == kGroups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == kGroups * kGroup) bring_pieces(a, rows, weights, shared, tiles, pieces);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    multiply_pieces<kKind>(a, shared, tiles, pieces);
  }
  __syncwarp();
  meet_cluster();  // no block ends while another may write into it
}

template <Activation kKind>
const char* launch_eight(const LinearArgs& a, const CUtensorMap& rows, const CUtensorMap& weights, void* stream) {
  const int64_t deep = (a.rows + kCluster * kRows - 1) / (kCluster * kRows);
  const int64_t blocks = kCluster * deep * ((a.out + kOutputs - 1) / kOutputs);
  const int64_t most = gpu().processors / kCluster * kCluster;
  const dim3 grid(static_cast<unsigned>(blocks < most ? blocks : most));
  return launch(eight_bits<kKind>, grid, dim3(kThreads), kShared, stream, a, rows, weights);
}

}  // namespace

bool eight_serves(int64_t width, int64_t out) {
  return has_instructions() && width % 16 == 0 && out % 16 == 0;
}

const char* eight_cuda(const LinearArgs& a, void* stream) {
  CUtensorMap rows, weights;
  if (!map_of(a.x, a.rows, a.width, kRows, &rows) ||
      !map_of(a.weight, a.out, a.width, kOutputs / kCluster, &weights))
    return "a matrix of 8 bits cannot be described to the GPU";
  if (a.activation == Activation::gelu) return launch_eight<Activation::gelu>(a, rows, weights, stream);
  if (a.activation == Activation::gelu_tanh) return launch_eight<Activation::gelu_tanh>(a, rows, weights, stream);
  return launch_eight<Activation::none>(a, rows, weights, stream);
}

}  // namespace lhcompile
