// Vectors of floats as wide as the instructions this file is compiled for, and loads and stores of every element type.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "args.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace lhcompile::LEVEL {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Floats __attribute__((vector_size(kWidth * 4), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(kWidth * 4), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(kWidth * 4), aligned(4)));
typedef uint8_t Bytes __attribute__((vector_size(kWidth), aligned(1)));
typedef uint16_t Halves __attribute__((vector_size(kWidth * 2), aligned(2)));

// 16-bit floats by their bits: float16 and bfloat16.
struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};
// float8 e4m3; its largest number, and what a row must reach not to be taken for zero.
struct Eight {
  uint8_t bits;
};
constexpr float kLargest = 448.0f, kSmallest = 1e-30f;

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// Compilers take such a conversion apart.
inline Words load_bytes(const void* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  return reinterpret_cast<Words>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from))));
#else
  return __builtin_convertvector(*static_cast<const Bytes*>(from), Words);
#endif
}

inline float widen(float x) { return x; }
inline float widen(Brain x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // The exponent is moved by a product, which gives subnormal numbers their value; infinity and NaN keep theirs.
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  const float scaled = bits_to_float(magnitude) * 0x1p112f;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0;
  return bits_to_float(float_to_bits(scaled) | special | sign);
#endif
}

// The exponent is moved by a product, as for float16.
inline float widen(Eight x) {
  const uint32_t magnitude = x.bits & 0x7fu;
  const float value = magnitude == 0x7fu ? NAN : bits_to_float(magnitude << 20) * 0x1p120f;
  return x.bits & 0x80u ? -value : value;
}
inline Floats load(const Eight* from) {
  const Words bits = load_bytes(from);
  const Floats value = reinterpret_cast<Floats>((bits & 0x7fu) << 20) * 0x1p120f;
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(value) | (bits & 0x80u) << 24);
}
// To the nearest, numbers beyond the largest to the largest.
inline void narrow(float x, Eight* to) {
  const float magnitude = std::fabs(x) < kLargest ? std::fabs(x) : kLargest;
  const uint32_t bits = float_to_bits(magnitude * 0x1p-120f);
  to->bits = static_cast<uint8_t>((bits + 0x7ffffu + (bits >> 20 & 1)) >> 20 | (float_to_bits(x) >> 24 & 0x80u));
}

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, Brain* to) {
  const uint32_t bits = float_to_bits(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to->bits = static_cast<uint16_t>(nan ? (bits >> 16 | 0x40) : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float x, Half* to) {
#if defined(__F16C__)
  to->bits = static_cast<uint16_t>(_cvtss_sh(x, 0));
#else
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: an addition rounds at the right place
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  }
  to->bits = static_cast<uint16_t>(half | sign);
#endif
}

// What a state of the type may be: float16 stops at its largest number. NaN stays NaN.
template <typename T>
float stopped(float x) {
  constexpr float kMost = 65504.0f;
  if constexpr (std::is_same_v<T, Half>) return x > kMost ? kMost : x < -kMost ? -kMost : x;
  return x;
}
template <typename T>
void keep(float x, T* to) {
  narrow(stopped<T>(x), to);
}

inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
inline Floats load(const Brain* from) {
  const Halves bits = *reinterpret_cast<const Halves*>(from);
  return reinterpret_cast<Floats>(__builtin_convertvector(bits, Words) << 16);
}
inline Floats load(const Half* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  Floats value;
  for (int i = 0; i < kWidth; i++) value[i] = widen(from[i]);
  return value;
#endif
}

inline float sum(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(x));
#else
  float each[kWidth];
  std::memcpy(each, &x, sizeof(x));
  for (int step = kWidth / 2; step > 0; step /= 2)
    for (int i = 0; i < step; i++) each[i] += each[i + step];
  return each[0];
#endif
}

// n elements to floats and back.
template <typename T>
void widen_all(const T* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) *reinterpret_cast<Floats*>(to + i) = load(from + i);
  for (; i < n; i++) to[i] = widen(from[i]);
}
template <typename T>
void add_all(const T* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) *reinterpret_cast<Floats*>(to + i) += load(from + i);
  for (; i < n; i++) to[i] += widen(from[i]);
}
template <typename T>
void narrow_all(const float* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) narrow(from[i], to + i);
}
template <typename T>
void keep_all(const float* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) keep(from[i], to + i);
}

// A word's lowest code of 4 bits, less 8.
inline Floats lowest_code(Words codes) {
#if defined(__AVX512F__)
  const __m512 numbers = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return reinterpret_cast<Floats>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(codes), numbers));
#else
  return __builtin_convertvector(reinterpret_cast<Ints>(codes & 15u), Floats) - 8.0f;
#endif
}

// Four words of codes in each block, of which there may be fewer than a vector holds: zeros stand for the others.
inline Words load_codes(const uint8_t* from, int64_t blocks) {
  if (blocks * 4 >= kWidth) return *reinterpret_cast<const Words*>(from);
  Words codes = {};
  std::memcpy(&codes, from, static_cast<size_t>(blocks) * 16);
  return codes;
}
// The scale of each word's block.
inline Floats load_scales(const Half* from, int64_t blocks) {
#if defined(__AVX512F__)
  uint64_t four = 0;
  if (blocks >= 4) {
    std::memcpy(&four, from, sizeof(four));
  } else {
    std::memcpy(&four, from, static_cast<size_t>(blocks) * 2);
  }
  const __m512 scales = _mm512_castps128_ps512(_mm_cvtph_ps(_mm_cvtsi64_si128(static_cast<int64_t>(four))));
  const __m512i block = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return reinterpret_cast<Floats>(_mm512_permutexvar_ps(block, scales));
#else
  Floats scales = {};
  for (int i = 0; i < kWidth && i / 4 < blocks; i++) scales[i] = widen(from[i / 4]);
  return scales;
#endif
}

// The nearest numbers of an element type.
template <typename T>
Floats nearest(Floats x) {
  if constexpr (std::is_same_v<T, Half>) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(_mm512_cvtph_ps(_mm512_cvtps_ph(reinterpret_cast<__m512>(x), 0)));
#elif defined(__F16C__)
    return reinterpret_cast<Floats>(_mm256_cvtph_ps(_mm256_cvtps_ph(reinterpret_cast<__m256>(x), 0)));
#endif
  }
  if constexpr (!std::is_same_v<T, float>) {
    for (int i = 0; i < kWidth; i++) {
      T as;
      narrow(x[i], &as);
      x[i] = widen(as);
    }
  }
  return x;
}

// Calls work with a null pointer of the element type.
template <typename F>
auto with_type(Type type, const F& work) {
  if (type == Type::f16) return work(static_cast<Half*>(nullptr));
  if (type == Type::bf16) return work(static_cast<Brain*>(nullptr));
  return work(static_cast<float*>(nullptr));
}

}  // namespace lhcompile::LEVEL
