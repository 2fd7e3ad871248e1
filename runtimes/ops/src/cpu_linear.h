// Linear on a processor: x is brought to float32 and normalized, then products of a few rows with a few outputs at
// once.
#pragma once

#include <algorithm>
#include <vector>

#include "vector.h"

namespace lhcompile::LEVEL {

constexpr int64_t kRows = kWidth == 16 ? 6 : 3, kOuts = 4;  // of one product, whose sums stay in registers
constexpr int64_t kBand = 4 * kRows;                        // rows that a few outputs' weights are held for
constexpr int64_t kChunk = 64;                              // outputs of one item

// Rows of x as they enter the product, and behind them what a 1 in each of them means.
inline int64_t linear_scratch(const LinearArgs& a) { return a.rows * (a.width + 1) * 4; }

inline int64_t linear_items(const LinearArgs& a) { return (a.out + kChunk - 1) / kChunk; }

template <typename T>
void rounded(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    T as;
    narrow(x[i], &as);
    x[i] = widen(as);
  }
}

inline void normalize(const LinearArgs& a, float* x) {
  double mean = 0, square = 0;
  if (a.norm == Norm::layer) {
    for (int64_t i = 0; i < a.width; i++) mean += x[i];
    mean /= static_cast<double>(a.width);
  }
  for (int64_t i = 0; i < a.width; i++) square += (x[i] - mean) * (x[i] - mean);
  const float center = static_cast<float>(mean);
  const float scale = static_cast<float>(1 / std::sqrt(square / static_cast<double>(a.width) + a.epsilon));
  for (int64_t i = 0; i < a.width; i++) {
    x[i] = (x[i] - center) * scale * a.norm_scale[i];
    if (a.norm_bias) x[i] += a.norm_bias[i];
  }
}

// A row of x, as it enters the product, to float32.
template <typename T>
void prepare(const LinearArgs& a, float* to, int64_t row) {
  float* x = to + row * a.width;
  widen_all(static_cast<const T*>(a.x) + row * a.width, x, a.width);
  float& unit = to[a.rows * a.width + row];
  unit = 1;
  if (a.norm != Norm::none) normalize(a, x);
  if (a.weight_type == Type::e4m3) {
    float largest = kSmallest;
    for (int64_t i = 0; i < a.width; i++) largest = std::max(largest, std::fabs(x[i]));
    unit = largest / kLargest;
    for (int64_t i = 0; i < a.width; i++) x[i] /= unit;
    rounded<Eight>(x, a.width);
  } else if (a.norm != Norm::none) {
    rounded<T>(x, a.width);
  }
}

inline void linear_prepare(const LinearArgs& a, void* scratch, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; row++)
    with_type(a.signal, [&](auto* kind) {
      prepare<std::remove_pointer_t<decltype(kind)>>(a, static_cast<float*>(scratch), row);
    });
}
inline float activated(Activation kind, float x) {
  if (kind == Activation::gelu) return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
  if (kind == Activation::gelu_tanh)
    return 0.5f * x * (1.0f + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
  return x;
}

template <typename T>
void finish(const LinearArgs& a, int64_t row, int64_t out, float product) {
  if (a.bias)
    with_type(a.bias_type, [&](auto* kind) {
      product += widen(static_cast<const std::remove_pointer_t<decltype(kind)>*>(a.bias)[out]);
    });
  product = activated(a.activation, product);
  if (a.residual) product += widen(static_cast<const T*>(a.residual)[row * a.out + out]);
  narrow(product, static_cast<T*>(a.y) + row * a.out + out);
}

// R rows by N outputs: sums over the width. weight: of those outputs
template <typename W, typename T, int R, int N>
void product(const LinearArgs& a, const W* weight, const float* x, int64_t row, int64_t out) {
  const float* units = x + a.rows * a.width + row;
  x += row * a.width;
  Floats sums[R][N] = {};
  int64_t k = 0;
  for (; k + kWidth <= a.width; k += kWidth) {
    Floats w[N];
    for (int n = 0; n < N; n++) w[n] = load(weight + n * a.width + k);
    for (int r = 0; r < R; r++) {
      const Floats heard = load(x + r * a.width + k);
      for (int n = 0; n < N; n++) sums[r][n] += heard * w[n];
    }
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) {
      float total = sum(sums[r][n]);
      for (int64_t i = k; i < a.width; i++) total += x[r * a.width + i] * widen(weight[n * a.width + i]);
      if (a.weight_type == Type::e4m3) total *= units[r] * static_cast<const float*>(a.weight_scale)[out + n];
      finish<T>(a, row + r, out + n, total);
    }
}

template <typename W, typename T, int N>
void products(const LinearArgs& a, const W* weight, const float* x, int64_t row, int64_t end, int64_t out) {
  for (; row + kRows <= end; row += kRows) product<W, T, kRows, N>(a, weight, x, row, out);
  for (; row < end; row++) product<W, T, 1, N>(a, weight, x, row, out);
}

template <typename W, typename T>
void linear_item(const LinearArgs& a, const float* x, int64_t item) {
  const W* weight = static_cast<const W*>(a.weight);
  const int64_t end = std::min(item * kChunk + kChunk, a.out), wide = a.width;
  for (int64_t row = 0; row < a.rows; row += kBand) {
    const int64_t last = std::min(row + kBand, a.rows);
    int64_t out = item * kChunk;
    for (; out + kOuts <= end; out += kOuts) products<W, T, kOuts>(a, weight + out * wide, x, row, last, out);
    for (; out < end; out++) products<W, T, 1>(a, weight + out * wide, x, row, last, out);
  }
}

// The weight of an output in the signal's numbers, from 4 bits.
template <typename T>
void widen_codes(const LinearArgs& a, int64_t out, float* to) {
  const int64_t blocks = a.width / kBlock;
  const uint8_t* bytes = static_cast<const uint8_t*>(a.weight) + out * a.width / 2;
  const Half* scales = static_cast<const Half*>(a.weight_scale) + out * blocks;
  for (int64_t block = 0; block < blocks; block++) {
    uint8_t codes[kBlock];
    unpack(bytes + block * kBlock / 2, codes);
    const float scale = widen(scales[block]);
    for (int i = 0; i < kBlock; i += kWidth) {
      const Ints code = reinterpret_cast<Ints>(load_bytes(codes + i)) - 8;
      *reinterpret_cast<Floats*>(to + block * kBlock + i) = nearest<T>(__builtin_convertvector(code, Floats) * scale);
    }
  }
}

// A few outputs' weights are widened once, for all rows.
template <typename T>
void linear_item_int4(const LinearArgs& a, const float* x, int64_t item) {
  std::vector<float> weight(static_cast<size_t>(kOuts * a.width));
  const int64_t end = std::min(item * kChunk + kChunk, a.out);
  int64_t out = item * kChunk;
  for (; out + kOuts <= end; out += kOuts) {
    for (int64_t n = 0; n < kOuts; n++) widen_codes<T>(a, out + n, weight.data() + n * a.width);
    products<float, T, kOuts>(a, weight.data(), x, 0, a.rows, out);
  }
  for (; out < end; out++) {
    widen_codes<T>(a, out, weight.data());
    products<float, T, 1>(a, weight.data(), x, 0, a.rows, out);
  }
}

inline void linear(const LinearArgs& a, const void* scratch, int64_t first, int64_t last) {
  with_type(a.signal, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    const float* x = static_cast<const float*>(scratch);
    for (int64_t item = first; item < last; item++) {
      if (a.weight_type == Type::u8) {
        linear_item_int4<T>(a, x, item);
      } else {
        a.weight_type == Type::e4m3 ? linear_item<Eight, T>(a, x, item) : linear_item<T, T>(a, x, item);
      }
    }
  });
}

}  // namespace lhcompile::LEVEL
