// How weights are kept, and how sixteen bytes of two of their rows are multiplied on the tensor cores. A sum over
// inputs may run in any order, so a thread takes numbers where they lie for those that the instruction wants of it.
#pragma once

#include "device.cuh"

namespace lhcompile {

// Sums [16, 8] over a warp += w [16, K] · x [8, K]ᵀ, for K = 16, or 32 of 8 bits. A thread gives two words of each row:
// {first of row t / 4 of w, first of row t / 4 + 8, second of the one, second of the other} and both of row t / 4 of x.
// It has the sums of those rows of w with rows t % 4 · 2 and one more of x.
__device__ inline void multiply_add(float (&sums)[4], const uint32_t (&w)[4], uint32_t x, uint32_t y, Half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(x), "r"(y));
}
__device__ inline void multiply_add(float (&sums)[4], const uint32_t (&w)[4], uint32_t x, uint32_t y, Brain) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(x), "r"(y));
}
__device__ inline void multiply_add(float (&sums)[4], const uint32_t (&w)[4], uint32_t x, uint32_t y, uint8_t) {
  asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(x), "r"(y));
}

// The numbers of a block of codes of 4 bits, N of which are stored at once.
template <typename T, int N>
__device__ inline void store_block(const Vector<uint8_t, kBlock / 2>& codes, float scale, T* to) {
#pragma unroll
  for (int i = 0; i < kBlock; i += N) {
    float some[N];
#pragma unroll
    for (int j = 0; j < N; j++)
      some[j] = scale * static_cast<float>((codes.element[(i + j) / 2] >> j % 2 * 4 & 15) - 8);
    store<T, N>(some, to + i);
  }
}

// Entry: what x is kept as; kInputs: of 16 bytes; kScaled: whether those have a scale, of 16 bits; `add` multiplies a
// thread's 16 bytes of two rows, whose scales are given, with x at the same inputs.
template <typename T>
struct Plain {
  using Entry = T;
  static constexpr bool kScaled = false;
  static constexpr int kInputs = 16 / sizeof(Entry);
  __device__ static void add(float (&sums)[4], uint4 upper, uint4 lower, Half, Half, const Entry* x, bool there,
                             int = 0) {
    const uint4 heard = there ? *reinterpret_cast<const uint4*>(x) : uint4{};
    multiply_add(sums, {upper.x, lower.x, upper.y, lower.y}, heard.x, heard.y, Entry());
    multiply_add(sums, {upper.z, lower.z, upper.w, lower.w}, heard.z, heard.w, Entry());
  }
};

using Eight = Plain<uint8_t>;  // e4m3, x too

// Two codes a byte, a scale for 16 bytes of them.
struct Four {
  using Entry = Half;
  static constexpr bool kScaled = true;
  static constexpr int kInputs = 32;
  // Codes i and i + 4 of eight, less 8 and scaled: halves whose bits are 0x6400 + code are 1024 + code.
  __device__ static uint32_t pair(uint32_t codes, int i, __half2 scale) {
    const uint32_t bits = (codes >> 4 * i & 0x000f000f) | 0x64006400;
    __half2 both;
    memcpy(&both, &bits, sizeof(bits));
    both = __hmul2(__hsub2(both, __half2half2(__float2half_rn(1032.0f))), scale);
    uint32_t result;
    memcpy(&result, &both, sizeof(both));
    return result;
  }
  // x: inputs 0, 4, 1, 5, 2, 6, 3, 7 of every eight, and number i of the four eights at i ^ crossed
  __device__ static void add(float (&sums)[4], uint4 upper, uint4 lower, Half upper_scale, Half lower_scale,
                             const Entry* x, bool there, int crossed = 0) {
    const uint32_t up[] = {upper.x, upper.y, upper.z, upper.w}, low[] = {lower.x, lower.y, lower.z, lower.w};
    const __half2 by_up = __half2half2(upper_scale), by_low = __half2half2(lower_scale);
#pragma unroll
    for (int word = 0; word < 4; word++) {
      const uint4 heard = there ? *reinterpret_cast<const uint4*>(x + 8 * (word ^ crossed)) : uint4{};
      const uint32_t u = up[word], l = low[word];
      multiply_add(sums, {pair(u, 0, by_up), pair(l, 0, by_low), pair(u, 1, by_up), pair(l, 1, by_low)}, heard.x,
                   heard.y, Half());
      multiply_add(sums, {pair(u, 2, by_up), pair(l, 2, by_low), pair(u, 3, by_up), pair(l, 3, by_low)}, heard.z,
                   heard.w, Half());
    }
  }
};

}  // namespace lhcompile
