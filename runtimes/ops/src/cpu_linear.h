// Linear on a processor: x is brought to float32 and normalized, then products of a few rows with a few outputs at
// once.
#pragma once

#include <algorithm>

#include "cpu_activation.h"
#include "cpu_bytes.h"

namespace lhcompile::LEVEL {

constexpr int64_t kRows = kWidth == 16 ? 6 : 3;  // of one product, whose sums stay in registers
constexpr int64_t kBand = 4 * kRows;             // rows that a few outputs' weights are held for
constexpr int64_t kChunk = 64;                   // outputs of one item
constexpr int64_t kPiece = 8 * kWidth;           // 4-bit codes of one vector
constexpr int64_t kAhead = 2048;                 // bytes of codes that are fetched ahead
using Totals = float[kChunk];
struct Four {};

// Floats of a row of x as it enters the product: for codes whole pieces.
inline int64_t row_of(const LinearArgs& a) {
  return a.weight_type == Type::u8 ? (a.width + kPiece - 1) / kPiece * kPiece : a.width;
}

// Rows of x as they enter the product, and behind them what a 1 in each of them means.
inline int64_t linear_scratch(const LinearArgs& a) { return a.rows * (row_of(a) + 1) * 4; }

inline int64_t linear_items(const LinearArgs& a) { return (a.out + kChunk - 1) / kChunk; }

template <typename T>
void rounded(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    T as;
    narrow(x[i], &as);
    x[i] = widen(as);
  }
}

// Σ (x − center)^power over a row, in double precision, several sums side by side.
template <int power>
double moment(const float* x, int64_t n, double center) {
  constexpr int kSums = 16;
  double sums[kSums] = {}, total = 0;
  auto add = [&](int lane, float value) {
    const double far = value - center;
    sums[lane] += power == 2 ? far * far : far;
  };
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int lane = 0; lane < kSums; lane++) add(lane, x[i + lane]);
  for (; i < n; i++) add(0, x[i]);
  for (double each : sums) total += each;
  return total;
}

inline void normalize(const LinearArgs& a, float* x) {
  double mean = 0;
  if (a.norm == Norm::layer) mean = moment<1>(x, a.width, 0) / static_cast<double>(a.width);
  const double square = moment<2>(x, a.width, mean);
  const float center = static_cast<float>(mean);
  const float scale = static_cast<float>(1 / std::sqrt(square / static_cast<double>(a.width) + a.epsilon));
  for (int64_t i = 0; i < a.width; i++) {
    x[i] = (x[i] - center) * scale * a.norm_scale[i];
    if (a.norm_bias) x[i] += a.norm_bias[i];
  }
}

// Codes of 8 bits in the place of x, or what they mean; behind the last input there are zeros.
inline void in_bytes(const LinearArgs& a, float* x) {
  std::fill(x + a.width, x + row_of(a), 0.0f);
  if constexpr (kByteProducts) {
    for (float* piece = x; piece < x + row_of(a); piece += kPiece) pack_piece(piece);
  } else {
    for (float* block = x; block < x + a.width; block += kBlock) round_to_bytes(block);
  }
}

// Input 8 · i + n of a piece goes to place n · kWidth + i; behind the last one there are zeros.
inline void in_order_of_codes(const LinearArgs& a, float* x) {
  std::fill(x + a.width, x + row_of(a), 0.0f);
  for (float* piece = x; piece < x + row_of(a); piece += kPiece) {
    float old[kPiece];
    std::copy(piece, piece + kPiece, old);
    for (int64_t i = 0; i < kPiece; i++) piece[i % 8 * kWidth + i / 8] = old[i];
  }
}

// A row of x, as it enters the product, to float32.
template <typename T>
void prepare(const LinearArgs& a, float* to, int64_t row) {
  float* x = to + row * row_of(a);
  float& unit = to[a.rows * row_of(a) + row];
  unit = 1;
  if (a.x_unit) {  // codes already
    widen_all(static_cast<const Eight*>(a.x) + row * a.width, x, a.width);
    unit = a.x_unit[row];
    return;
  }
  widen_all(static_cast<const T*>(a.x) + row * a.width, x, a.width);
  if (a.norm != Norm::none) normalize(a, x);
  if (a.y_unit) {
    const float bound = static_cast<float>(std::sqrt(moment<2>(x, a.width, 0))) * a.reach[0] + a.reach[1];
    a.y_unit[row] = std::max(bound, kSmallest) / kLargest;
  }
  if (a.weight_type == Type::e4m3) {
    float largest = kSmallest;
    for (int64_t i = 0; i < a.width; i++) largest = std::max(largest, std::fabs(x[i]));
    unit = largest / kLargest;
    for (int64_t i = 0; i < a.width; i++) x[i] /= unit;
    rounded<Eight>(x, a.width);
  } else if (a.norm != Norm::none) {
    rounded<T>(x, a.width);
  }
  if (a.weight_type != Type::u8) return;
  if (a.bytes) in_bytes(a, x);
  if (!a.bytes || !kByteProducts) in_order_of_codes(a, x);
}

inline void linear_prepare(const LinearArgs& a, void* scratch, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; row++)
    with_type(a.signal, [&](auto* kind) {
      prepare<std::remove_pointer_t<decltype(kind)>>(a, static_cast<float*>(scratch), row);
    });
}

// What a product is followed by, for the outputs from `first` on of a row.
template <typename T>
void finish(const LinearArgs& a, int64_t row, int64_t first, int64_t count, float* totals) {
  const int64_t at = row * a.out + first;
  if (a.bias)
    with_type(a.bias_type, [&](auto* kind) {
      add_all(static_cast<const std::remove_pointer_t<decltype(kind)>*>(a.bias) + first, totals, count);
    });
  if (a.activation != Activation::none)  // up to a whole vector: there is room behind the last
    for (int64_t i = 0; i < count; i += kWidth)
      *reinterpret_cast<Floats*>(totals + i) = activated(a.activation, load(totals + i));
  if (a.residual) add_all(static_cast<const T*>(a.residual) + at, totals, count);
  if (a.y_unit) {
    for (int64_t i = 0; i < count; i++) totals[i] /= a.y_unit[row];
    return narrow_all(totals, static_cast<Eight*>(a.y) + at, count);
  }
  narrow_all(totals, static_cast<T*>(a.y) + at, count);
}

// R rows by N outputs: sums over the width. weight: of those outputs; totals: of the first row and output
template <typename W, int R, int N>
void product(const LinearArgs& a, const W* weight, const float* x, int64_t row, int64_t out, Totals* totals) {
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
      totals[r][out % kChunk + n] = total;
    }
}

// The products of a piece of R rows, wide floats apart, with N weights in codes; what is left of the codes is of no use.
template <typename T, int R, int N>
void add_floats(const float* x, int64_t wide, Words (&codes)[N], const Floats (&scale)[N], Floats (&parts)[R][N]) {
  constexpr bool kExact = std::is_same_v<T, float>;
#pragma GCC unroll 8
  for (int each = 0; each < 8; each++) {
    Floats w[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      w[n] = kExact ? lowest_code(codes[n]) : nearest<T>(lowest_code(codes[n]) * scale[n]);
      codes[n] >>= 4;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Floats heard = load(x + r * wide + each * kWidth);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) parts[r][n] += heard * w[n];
    }
  }
}

// The same for a weight of 4-bit codes, T: the type that it is rounded to. A word holds eight codes, so lane i of the
// n-th of them is input 8 · i + n of a piece, and x lies in that order; with kBytes it is in codes of 8 bits.
template <typename T, bool kBytes, int R, int N>
void product_int4(const LinearArgs& a, const float* x, int64_t row, int64_t out, Totals* totals) {
  constexpr bool kExact = std::is_same_v<T, float>;  // then a scale is a factor of its block's sum
  const int64_t blocks = a.width / kBlock, wide = row_of(a);
  const uint8_t* bytes = static_cast<const uint8_t*>(a.weight) + out * a.width / 2;
  const Half* scales = static_cast<const Half*>(a.weight_scale) + out * blocks;
  x += row * wide;
  Floats sums[R][N] = {};
  for (int64_t k = 0; k < a.width; k += kPiece) {
    const int64_t count = std::min(kPiece, a.width - k) / kBlock;
    Words codes[N];
    Floats scale[N], parts[R][N] = {};
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      __builtin_prefetch(bytes + (n * a.width + k) / 2 + kAhead);
      codes[n] = load_codes(bytes + (n * a.width + k) / 2, count);
      scale[n] = load_scales(scales + n * blocks + k / kBlock, count);
    }
    if constexpr (kBytes) {
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int n = 0; n < N; n++)
          parts[r][n] = multiply(codes[n], *reinterpret_cast<const BytePiece*>(x + r * wide + k));
    } else {
      add_floats<T, R, N>(x + k, wide, codes, scale, parts);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) sums[r][n] += kExact ? parts[r][n] * scale[n] : parts[r][n];
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) totals[r][out % kChunk + n] = sum(sums[r][n]);
}

// W: of the weight's elements, or Eight and Four, whose rows of x have units or an order of their own.
template <typename W, typename T, int R, int N>
void product_of(const LinearArgs& a, const float* x, int64_t row, int64_t out, Totals* totals) {
  if constexpr (std::is_same_v<W, Four>) {
    if constexpr (kByteProducts && std::is_same_v<T, float>)
      if (a.bytes) return product_int4<T, true, R, N>(a, x, row, out, totals);
    product_int4<T, false, R, N>(a, x, row, out, totals);
  } else {
    product<W, R, N>(a, static_cast<const W*>(a.weight) + out * a.width, x, row, out, totals);
  }
}

// Outputs from `out` on, N at a time, for rows [row, end).
template <typename W, typename T, int N>
int64_t products(const LinearArgs& a, const float* x, int64_t row, int64_t end, int64_t out, int64_t last,
                 Totals* totals) {
  for (; out + N <= last; out += N) {
    int64_t r = row;
    for (; r + kRows <= end; r += kRows) product_of<W, T, kRows, N>(a, x, r, out, totals + r - row);
    for (; r < end; r++) product_of<W, T, 1, N>(a, x, r, out, totals + r - row);
  }
  return out;
}

// A row alone is bound by memory, which is fastest where it is read as one stream; codes, as they are widened, by time.
template <typename W, typename T>
void linear_item(const LinearArgs& a, const float* x, int64_t item) {
  constexpr bool kCodes = std::is_same_v<W, Four>;
  const int64_t first = item * kChunk, last = std::min(first + kChunk, a.out);
  Totals totals[kBand];
  for (int64_t row = 0; row < a.rows; row += kBand) {
    const int64_t end = std::min(row + kBand, a.rows);
    int64_t out = first;
    if (!kCodes && end - row > 1) out = products<W, T, 4>(a, x, row, end, out, last, totals);
    if (kCodes) out = products<W, T, 2>(a, x, row, end, out, last, totals);
    products<W, T, 1>(a, x, row, end, out, last, totals);
    for (int64_t r = row; r < end; r++) finish<T>(a, r, first, last - first, totals[r - row]);
  }
}

inline void linear(const LinearArgs& a, const void* scratch, int64_t first, int64_t last) {
  with_type(a.signal, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    const float* x = static_cast<const float*>(scratch);
    for (int64_t item = first; item < last; item++) {
      if (a.weight_type == Type::u8) {
        linear_item<Four, T>(a, x, item);
      } else {
        a.weight_type == Type::e4m3 ? linear_item<Eight, T>(a, x, item) : linear_item<T, T>(a, x, item);
      }
    }
  });
}

}  // namespace lhcompile::LEVEL
