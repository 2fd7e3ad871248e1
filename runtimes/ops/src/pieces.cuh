// Pieces of a weight, 64 outputs of 128 bytes, times rows of x: asynchronous products on the tensor cores of compute
// capability 9.0, for weights of 16, 8 and 4 bits.
#pragma once

#include "tensor.cuh"

namespace lhcompile {

constexpr int kOutputs = 64, kBox = kOutputs * kBoxBytes;

struct Code {  // e4m3
  uint8_t bits;
};

// sums += 64 outputs × N rows, over 32 bytes of both
#define LHC_MULTIPLY(W, N, TYPES, TURNED, NUMBERS, FACTORS, ...)                                              \
  __device__ inline void multiply(const W*, float (&s)[N / 2], uint64_t weight, uint64_t x) {                 \
    asm volatile(                                                                                             \
        "{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #N TYPES " {" NUMBERS \
        "}, " FACTORS ", add, 1, 1" TURNED ";\n}\n"                                                           \
        : __VA_ARGS__                                                                                         \
        : "l"(weight), "l"(x));                                                                               \
  }
// The same, of 16 inputs that each thread holds of two outputs: {2 of the first, of the second, 2 more of each}
#define LHC_MULTIPLY_HELD(N, NUMBERS, FACTORS, ...)                                                                   \
  __device__ inline void multiply_held(float (&s)[N / 2], const uint32_t (&w)[4], uint64_t x) {                      \
    asm volatile(                                                                                                     \
        "{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" NUMBERS \
        "}, " FACTORS ", add, 1, 1, 0;\n}\n"                                                                          \
        : __VA_ARGS__                                                                                                 \
        : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "l"(x));                                                        \
  }
// Until all but the last `kLeft` that were committed are done.
#define LHC_AWAIT(N, LEFT, ...)                                                                    \
  template <int kLeft>                                                                             \
  __device__ inline void multiply_await(float (&s)[N / 2]) {                                       \
    asm volatile("wgmma.wait_group.sync.aligned " LEFT ";" : __VA_ARGS__ : "n"(kLeft) : "memory"); \
  }
#define LHC_NUMBERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LHC_NUMBERS_16 LHC_NUMBERS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LHC_NUMBERS_32 \
  LHC_NUMBERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
LHC_MULTIPLY(Half, 16, "k16.f32.f16.f16", ", 0, 0", LHC_NUMBERS_8, "%8, %9", LHC_8(s, 0))
LHC_MULTIPLY(Brain, 16, "k16.f32.bf16.bf16", ", 0, 0", LHC_NUMBERS_8, "%8, %9", LHC_8(s, 0))
LHC_MULTIPLY(Half, 32, "k16.f32.f16.f16", ", 0, 0", LHC_NUMBERS_16, "%16, %17", LHC_16(s, 0))
LHC_MULTIPLY(Brain, 32, "k16.f32.bf16.bf16", ", 0, 0", LHC_NUMBERS_16, "%16, %17", LHC_16(s, 0))
LHC_MULTIPLY(Code, 16, "k32.f32.e4m3.e4m3", "", LHC_NUMBERS_8, "%8, %9", LHC_8(s, 0))
LHC_MULTIPLY(Code, 32, "k32.f32.e4m3.e4m3", "", LHC_NUMBERS_16, "%16, %17", LHC_16(s, 0))
LHC_MULTIPLY(Code, 64, "k32.f32.e4m3.e4m3", "", LHC_NUMBERS_32, "%32, %33", LHC_32(s, 0))
LHC_MULTIPLY_HELD(16, LHC_NUMBERS_8, "{%8, %9, %10, %11}, %12", LHC_8(s, 0))
LHC_MULTIPLY_HELD(32, LHC_NUMBERS_16, "{%16, %17, %18, %19}, %20", LHC_16(s, 0))
LHC_AWAIT(16, "%8", LHC_8(s, 0))
LHC_AWAIT(32, "%16", LHC_16(s, 0))
LHC_AWAIT(64, "%32", LHC_32(s, 0))

// Entry: of x; kInputs: of a piece; kBoxes: of x beside it; kScales: bytes of scales beside each of its rows; kSlot: its
// bytes with them; kCoded: codes have a unit for each row and each output; kHeld: threads read the weight, and the piece
// may be overwritten once they have. `multiply_piece` begins sums += piece × N rows of x, boxes of which follow one
// another, and ends what was begun before.
template <typename T, bool kCodes = false>
struct Whole {
  using Entry = T;
  static constexpr int kInputs = kBoxBytes / sizeof(T), kBoxes = 1, kScales = 0, kSlot = kBox;
  static constexpr bool kCoded = kCodes, kHeld = false;
  template <int kSums>
  __device__ static void multiply_piece(float (&sums)[kSums], const char* slot, const char* x) {
    const uint64_t weight = described(slot), rows = described(x);
    multiply_begin();
#pragma unroll
    for (int k = 0; k < kBoxBytes / 32; k++) multiply(static_cast<T*>(nullptr), sums, weight + 2 * k, rows + 2 * k);
    multiply_commit();
    multiply_await<1>(sums);
  }
};
using EightBits = Whole<Code, true>;

// Codes of 4 bits, with a scale of 16 bits for 32 inputs. A thread has two outputs, and of every eight bytes of their
// codes the same one of the first four and of the last four: what the instruction wants of it.
struct FourBits {
  using Entry = Half;
  static constexpr int kInputs = 2 * kBoxBytes, kBoxes = 4, kScales = kInputs / kBlock * 2;
  static constexpr int kSlot = kBox + kOutputs * kScales;
  static constexpr bool kCoded = false, kHeld = true;
  // Both codes of the byte of `word` that `picked` names, less 8 and scaled. Halves whose bits are 0x6400 + n are
  // 1024 + n, and the second code is left where it is, 16 times as large.
  __device__ static uint32_t pair(uint32_t word, uint32_t picked, __half2 scale) {
    const uint32_t bits = __byte_perm(word, 0x64646464, picked) & 0x64f0640f;
    __half2 both;
    memcpy(&both, &bits, sizeof(bits));
    both = __hfma2(both, __floats2half2_rn(1.0f, 1.0f / 16), __floats2half2_rn(-1032.0f, -72.0f));
    both = __hmul2(both, scale);
    uint32_t result;
    memcpy(&result, &both, sizeof(both));
    return result;
  }
  template <int kSums>
  __device__ static void multiply_piece(float (&sums)[kSums], const char* slot, const char* x) {
    const int lane = threadIdx.x % 32, output = threadIdx.x / 32 * 16 + lane / 4;
    const uint32_t picked = 0x4040 + lane % 4 * 0x0101;
    const char* scales = slot + kBox + output * kScales;
    uint32_t held[2][4][4];  // one product reads what it multiplies while the next is made
#pragma unroll
    for (int box = 0; box < kBoxes; box++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const char* row = slot + (output + 8 * i) * kBoxBytes;
        const auto scale = *reinterpret_cast<const __half2*>(scales + 8 * i * kScales + 4 * box);
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const uint4 words = *reinterpret_cast<const uint4*>(row + ((2 * box + j ^ output % 8) * 16));  // swizzled
          const __half2 by = j ? __high2half2(scale) : __low2half2(scale);
          held[box % 2][2 * j][i] = pair(words.x, picked, by), held[box % 2][2 * j][i + 2] = pair(words.y, picked, by);
          held[box % 2][2 * j + 1][i] = pair(words.z, picked, by);
          held[box % 2][2 * j + 1][i + 2] = pair(words.w, picked, by);
        }
      }
      const uint64_t rows = described(x + box * kSums * 2 * kBoxBytes);
      multiply_begin();
#pragma unroll
      for (int k = 0; k < 4; k++) multiply_held(sums, held[box % 2][k], rows + 2 * k);
      multiply_commit();
      if (box < kBoxes - 1) multiply_await<1>(sums);
    }
    multiply_await<0>(sums);  // the registers are free again
  }
};

}  // namespace lhcompile
