// What the kernels that stream weights past a few rows of x share: bulk copies into shared memory, which keep no thread
// waiting, and the rows of x, normalized, as they enter the product.
#pragma once

#include "device.cuh"

namespace lhcompile {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
__device__ inline void barrier_begin(uint64_t* barrier, int arrivals = 1) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}
__device__ inline void barriers_begun() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ inline void copies_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Of what leaves the cache that all multiprocessors share before all else.
__device__ inline uint64_t first_out() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// Of a weight, which a step reads once.
__device__ inline void copy_begin(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(first_out())
      : "memory");
}
__device__ inline void copies_await(uint64_t* barrier, uint32_t parity) {
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

constexpr int kMostRows = 8;  // of x where there are few

// Rows of x in shared memory, as they enter the product. Warps have equal parts of a row each; `units` are what a 1
// means where rows are kept in 8 bits, and kMostRows behind that what it means in y, if y is.
// kTurned: of every eight inputs the order is 0, 4, 1, 5, 2, 6, 3, 7. kCrossed: number i of the eights of inputs is at
// i ^ (i / 8 % 4), so that threads which read four of them each, one after the other, read from different banks.
template <typename T, typename Entry, int kWarps, bool kTurned = false, bool kCrossed = false>
struct Entering {
  static constexpr int kCount = 16 / sizeof(T);
  const LinearArgs& a;
  Entry* rows;
  float *units, *room;  // room: two numbers a warp
  int stride, padded;   // entries from row to row, and of a row with the zeros behind it
  int together = kWarps, warp = threadIdx.x / 32, m, begin, end;  // warps of a row; this one's row and part of it
  float scale[kCount], shift[kCount];                             // of the thread's first numbers

  __device__ Entering(const LinearArgs& a_, Entry* rows_, float* units_, float* room_, int stride_, int padded_)
      : a(a_), rows(rows_), units(units_), room(room_), stride(stride_), padded(padded_) {
    while (together * a.rows > kWarps) together /= 2;
    m = warp / together;
    const int width = static_cast<int>(a.width), each = (width / kCount + together - 1) / together * kCount;
    begin = warp % together * each, end = m < a.rows ? min(begin + each, width) : begin;
    begin += threadIdx.x % 32 * kCount;
    if (begin < end) constants(begin, scale, shift);
  }
  __device__ void constants(int i, float (&by)[kCount], float (&plus)[kCount]) const {
#pragma unroll
    for (int j = 0; j < kCount; j++) by[j] = 1.0f, plus[j] = 0.0f;
    if (a.norm_scale) load_floats(a.norm_scale + i, by);
    if (a.norm_bias) load_floats(a.norm_bias + i, plus);
  }

  // Numbers of all warps of this one's row, joined; the room is free again two calls later.
  template <typename F>
  __device__ float over_row(float x, int call, const F& join) const {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = join(x, __shfl_xor_sync(~0u, x, step));
    float* to = room + call % 2 * kWarps;
    if (threadIdx.x % 32 == 0) to[warp] = x;
    __syncthreads();
    x = to[warp / together * together + threadIdx.x % together];
    for (int step = together / 2; step > 0; step /= 2) x = join(x, __shfl_xor_sync(~0u, x, step));
    return x;
  }

  __device__ void take() const {
    const auto add = [](float x, float y) { return x + y; };
    const T* x = static_cast<const T*>(a.x) + m * a.width;
    float first[kCount] = {}, mean = 0, by = 1, unit = 1;
    if (begin < end) load<T, kCount>(x + begin, first);
    auto all = [&](const auto& work) {
      if (begin < end) work(begin, first, scale, shift);
      for (int i = begin + 32 * kCount; i < end; i += 32 * kCount) {
        float each[kCount], scale_here[kCount], shift_here[kCount];
        load<T, kCount>(x + i, each);
        constants(i, scale_here, shift_here);
        work(i, each, scale_here, shift_here);
      }
    };
    using Numbers = const float (&)[kCount];
    if (a.norm == Norm::layer) {
      all([&](int, Numbers each, Numbers, Numbers) {
#pragma unroll
        for (int j = 0; j < kCount; j++) mean += each[j];
      });
      mean = over_row(mean, 0, add) / a.width;
    }
    if (a.norm != Norm::none) {
      float square = 0;
      all([&](int, Numbers each, Numbers, Numbers) {
#pragma unroll
        for (int j = 0; j < kCount; j++) square += (each[j] - mean) * (each[j] - mean);
      });
      by = rsqrtf(over_row(square, 1, add) / a.width + a.epsilon);
    }
    auto normed = [&](Numbers each, Numbers times, Numbers plus, float (&to)[kCount]) {
#pragma unroll
      for (int j = 0; j < kCount; j++) to[j] = (each[j] - mean) * by * times[j] + plus[j];
    };
    if constexpr (sizeof(Entry) == 1) {
      float largest = 0, square = 0;
      all([&](int i, Numbers each, Numbers times, Numbers plus) {
        float to[kCount];
        normed(each, times, plus, to);
#pragma unroll
        for (int j = 0; j < kCount; j++) largest = fmaxf(largest, fabsf(to[j])), square += to[j] * to[j];
      });
      unit = fmaxf(over_row(largest, 2, [](float p, float q) { return fmaxf(p, q); }), kSmallest) / kLargest;
      if (a.y_unit) square = over_row(square, 3, add);
      if (m < a.rows && warp % together == 0 && threadIdx.x % 32 == 0) {
        units[m] = unit;
        if (a.y_unit) a.y_unit[m] = units[kMostRows + m] = reached(a, square);
      }
    }
    all([&](int i, Numbers each, Numbers times, Numbers plus) {
      float to[kCount];
      normed(each, times, plus, to);
      keep(i, to, unit);
    });
    if (m < a.rows && warp % together == 0)
      for (int i = static_cast<int>(a.width) + threadIdx.x % 32; i < padded; i += 32) rows[m * stride + i] = Entry();
    __syncthreads();
  }
  __device__ void keep(int i, const float (&each)[kCount], float unit) const {
    Vector<Entry, kCount> codes;
    if constexpr (sizeof(Entry) == 1) {
#pragma unroll
      for (int j = 0; j < kCount; j++) codes.element[j] = to_eight(each[j] / unit);
    } else {
      narrow(each, &codes);
    }
    if constexpr (kTurned) {
      Vector<Entry, kCount> turned;
#pragma unroll
      for (int j = 0; j < kCount; j++) turned.element[j / 4 + j % 4 * 2] = codes.element[j];
      codes = turned;
    }
    put(codes, rows + m * stride + (kCrossed ? i ^ (i / 64 % 4 * 8) : i));
  }
};

// Rows of x that are codes already.
__device__ inline void enter_codes(const LinearArgs& a, uint8_t* rows, float* units, int stride, int padded) {
  const int words = padded / 16, width = static_cast<int>(a.width / 16);
  for (int i = threadIdx.x; i < static_cast<int>(a.rows) * words; i += blockDim.x) {
    const auto* from = static_cast<const uint4*>(a.x) + i / words * width + i % words;
    *reinterpret_cast<uint4*>(rows + i / words * stride + i % words * 16) = i % words < width ? *from : uint4{};
  }
  if (threadIdx.x < a.rows) units[threadIdx.x] = a.x_unit[threadIdx.x];
  __syncthreads();
}

// Whether addresses are those of 16-byte vectors, and a block has so much shared memory.
inline bool stream_serves(const LinearArgs& a, size_t shared) {
  auto even = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; };
  return even(a.x) && even(a.weight) && even(a.weight_scale) && even(a.norm_scale) && even(a.norm_bias) &&
         shared <= static_cast<size_t>(gpu().shared);
}

}  // namespace lhcompile
