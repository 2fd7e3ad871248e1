// Signals of 8 bits beside weights of 4: x is a whole number times a unit, one for each block of inputs. Where there are
// instructions for it, whole numbers are multiplied; elsewhere x is the float that they mean.
#pragma once

#include <algorithm>

#include "vector.h"

namespace lhcompile::LEVEL {

#if defined(__AVX512VNNI__)
constexpr bool kByteProducts = true;
#else
constexpr bool kByteProducts = false;
#endif
constexpr float kRound = 0x1.8p23f;  // a sum with it is a whole number

// Codes of a block of x in the lowest byte of each word, in order, and their unit; it is NaN where a number is not
// finite.
inline float codes_of(const float* x, Words (&codes)[kBlock / kWidth]) {
  Floats most = {}, poison = {};
  for (int i = 0; i < kBlock; i += kWidth) {
    const Floats here = load(x + i);
    const Floats size = reinterpret_cast<Floats>(reinterpret_cast<Words>(here) & 0x7fffffffu);
    most = size > most ? size : most;
    poison += here * 0.0f;
  }
  float largest = kSmallest, wrong = 0;
  for (int lane = 0; lane < kWidth; lane++) largest = std::max(largest, most[lane]), wrong += poison[lane];
  const float unit = largest / 127.0f;
  for (int i = 0; i < kBlock; i += kWidth)
    codes[i / kWidth] = reinterpret_cast<Words>(load(x + i) / unit + kRound);
  return unit + wrong;
}

// A block of x as its codes mean it.
inline void round_to_bytes(float* x) {
  Words codes[kBlock / kWidth];
  const float unit = codes_of(x, codes);
  for (int i = 0; i < kBlock; i += kWidth)
    *reinterpret_cast<Floats*>(x + i) = (reinterpret_cast<Floats>(codes[i / kWidth]) - kRound) * unit;
}

// As many inputs as a vector has weights, in the place of the floats they come from: a byte of weights is an even and an
// odd input, and a word four of them; −8 times the sum of a word's inputs, for weights are stored with 8 added.
struct BytePiece {
  int8_t even[4 * kWidth], odd[4 * kWidth];
  int32_t offset[kWidth];
  float unit[kWidth];
};

// Only where there are such instructions: a piece of x in the place of its floats, and the sum of a word's products in
// each lane, eight codes of 4 bits and eight of x.
inline void pack_piece(float* x);
inline Floats multiply(Words weights, const BytePiece& x);

#if defined(__AVX512VNNI__)
inline void pack_piece(float* x) {
  alignas(64) int8_t bytes[2][4 * kWidth];  // all codes in order
  alignas(64) BytePiece packed;
  for (int block = 0; block < kWidth / 4; block++) {
    Words codes[kBlock / kWidth];
    const float unit = codes_of(x + kBlock * block, codes);
    for (int i = 0; i < kBlock / kWidth; i++)
      _mm_store_si128(reinterpret_cast<__m128i*>(bytes[0] + kBlock * block + i * kWidth),
                      _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(codes[i])));
    for (int i = 0; i < 4; i++) packed.unit[4 * block + i] = unit;
  }
  for (int half = 0; half < 2; half++) {
    const __m512i pairs = _mm512_load_si512(bytes[half]);
    auto at = [half](int8_t* to) { return reinterpret_cast<__m256i*>(to + 2 * kWidth * half); };
    _mm256_store_si256(at(packed.even), _mm512_cvtepi16_epi8(pairs));
    _mm256_store_si256(at(packed.odd), _mm512_cvtepi16_epi8(_mm512_srli_epi16(pairs, 8)));
  }
  const __m512i eights = _mm512_set1_epi8(8), zero = _mm512_setzero_si512();
  __m512i sums = _mm512_dpbusd_epi32(zero, eights, _mm512_load_si512(packed.even));
  sums = _mm512_dpbusd_epi32(sums, eights, _mm512_load_si512(packed.odd));
  _mm512_store_si512(packed.offset, _mm512_sub_epi32(zero, sums));
  std::memcpy(x, &packed, sizeof(packed));
}

inline Floats multiply(Words weights, const BytePiece& x) {
  const auto low = _mm512_set1_epi8(15);
  const auto bytes = reinterpret_cast<__m512i>(weights);
  __m512i sums = _mm512_loadu_si512(x.offset);
  sums = _mm512_dpbusd_epi32(sums, _mm512_and_si512(bytes, low), _mm512_loadu_si512(x.even));
  sums = _mm512_dpbusd_epi32(sums, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low), _mm512_loadu_si512(x.odd));
  return reinterpret_cast<Floats>(_mm512_cvtepi32_ps(sums)) * load(x.unit);
}
#endif

}  // namespace lhcompile::LEVEL
