// What products on the tensor cores of compute capability 9.0 share: clusters of blocks, boxes of matrices that are
// brought into shared memory, and their multiplication, asynchronous, by groups of four warps.
#pragma once

#include <cuda.h>

#include "products.h"
#include "stream.cuh"

namespace lhcompile {

constexpr int kGroup = 128;     // threads of four warps, which multiply together
constexpr int kBoxBytes = 128;  // of a row in a box

__device__ inline uint32_t rank_in_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ inline void cluster_await() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ inline void meet_cluster() {
  cluster_arrive();
  cluster_await();
}
// Where a block of the cluster has what is here.
__device__ inline uint32_t there(const void* here, int rank) {
  uint32_t place;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(place) : "r"(shared_address(here)), "r"(rank));
  return place;
}
// At a barrier that is there, where copies and products, which have an order of their own, are all it orders.
__device__ inline void arrive_at(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// The same where blocks then read or overwrite what others wrote with stores of their own, and until all have arrived.
__device__ inline void cluster_arrive_at(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void cluster_await_at(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// A box of the matrix, from (column, row) on.
__device__ inline void bring(void* to, const CUtensorMap& map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
// The same, which goes out of the cache as the policy says.
__device__ inline void bring(void* to, const CUtensorMap& map, int column, int row, uint64_t* barrier,
                             uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}
// Of a box's rows in shared memory, as `bring` swizzles them.
__device__ inline uint64_t described(const void* rows) {
  constexpr uint64_t kSwizzle128 = 1, kEightRows = 1024 / 16;
  return (shared_address(rows) & 0x3ffff) >> 4 | uint64_t{1} << 16 | kEightRows << 32 | kSwizzle128 << 62;
}

#define LHC_8(a, i) "+f"(a[i]), "+f"(a[i + 1]), "+f"(a[i + 2]), "+f"(a[i + 3]), "+f"(a[i + 4]), "+f"(a[i + 5]), \
                    "+f"(a[i + 6]), "+f"(a[i + 7])
#define LHC_16(a, i) LHC_8(a, i), LHC_8(a, i + 8)
#define LHC_32(a, i) LHC_16(a, i), LHC_16(a, i + 16)

__device__ inline void multiply_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// The threads of one group.
__device__ inline void group_meets(int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(kGroup) : "memory");
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Null where the driver is too old.
inline Encode encoder() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t problem =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return problem == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function)
                                                                           : nullptr;
  }();
  return found;
}

inline bool has_instructions() { return !is_withheld && gpu().capability == 90 && encoder(); }

// A matrix whose rows have so many bytes, brought in boxes of `box` rows, swizzled where they have kBoxBytes of each;
// what lies outside of it is zero.
inline bool map_of(const void* matrix, int64_t rows, int64_t bytes, int box, CUtensorMap* map, int of_row = kBoxBytes) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(bytes), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[] = {static_cast<cuuint64_t>(bytes)};
  const cuuint32_t boxes[] = {static_cast<cuuint32_t>(of_row), static_cast<cuuint32_t>(box)}, steps[] = {1, 1};
  const auto swizzle = of_row == kBoxBytes ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE;
  return encoder()(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(matrix), sizes, pitch, boxes, steps,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace lhcompile
