// What the kernels are called with: sizes, element types and addresses. The operators themselves are specified in
// lhcompile/lower/functions.py and projections.py; names are those used there.
#pragma once

#include <cstdint>

namespace lhcompile {

// Element types, by the numbers ONNX gives them.
enum class Type : int32_t { none = 0, f32 = 1, u8 = 2, i32 = 6, i64 = 7, f16 = 10, bf16 = 16, e4m3 = 17 };

inline int64_t size_of(Type type) {
  switch (type) {
    case Type::f32:
    case Type::i32:
      return 4;
    case Type::f16:
    case Type::bf16:
      return 2;
    case Type::i64:
      return 8;
    default:
      return 1;
  }
}

// Inputs that share a scale of 4-bit codes.
constexpr int kBlock = 32;

enum class Norm : int32_t { none, layer, rms };
enum class Activation : int32_t { none, gelu, gelu_tanh };

// Tokens of the past that HyenaStep takes (_MOST in lhcompile/lower/decode.py).
constexpr int64_t kMostPast = 7;

// Of HyenaMixer; of HyenaStep where `past` has tokens, [batch, 1, 3 · channels] each and the oldest first, in place of
// conv_state and new_conv_state.
struct MixerArgs {
  int64_t batch, time, channels, taps, order;
  int64_t states;  // of a row of the packed state; 0 where it is [batch, order, channels]
  int64_t block, outer;
  Type signal, conv, recurrent;
  const void *projected, *conv_state, *state;
  const float *weight, *bias, *own, *other, *readout, *direct;  // bias and other may be null
  const int32_t* index;                                         // null unless packed
  void *mixed, *new_conv_state, *new_state;
  const void* past[kMostPast];
};

// Projections of `rows` tokens: y [rows, out] = residual + activation(norm(x) Wᵀ + bias), x [rows, width].
struct LinearArgs {
  int64_t rows, width, out;
  Type signal;       // of x, residual and y
  Type weight_type;  // that of the signal; e4m3 with weight_scale [out]; u8, 4-bit codes, with scales [out, width / 32]
  Type bias_type;
  Norm norm;
  Activation activation;
  float epsilon;
  const void *x, *weight, *bias, *residual, *weight_scale;  // bias, residual may be null
  const float *norm_scale, *norm_bias;                      // norm_bias may be null
  void* y;
  int32_t bytes;  // x of float32 is rounded to 8 bits beside weights of 4; on processors
  // Of the halves of MlpFp8. x_unit: x has codes e4m3, and this is what a 1 in them means, for each row. y_unit: y is to
  // have them, with max(reach[0] · ‖norm(x)‖ + reach[1], 1e-30) / 448 for each row, which is written there.
  const float *x_unit, *reach;
  float* y_unit;
};

// Rows of a table: x [rows, width] = table[tokens], of the table's type; of float16 where the table is u8, codes of 4 bits
// [entries, width / 32, 16] with scales [entries, width / 32]. Tokens count from the end where they are negative.
struct EmbeddingArgs {
  int64_t rows, width, entries;
  Type table_type;
  const void *table, *scale;
  const int64_t* tokens;
  void* x;
};

struct SampleArgs {
  int64_t batch, vocab;
  Type signal;
  const void* logits;
  const float *uniform, *temperature, *top_p;
  const int64_t* top_k;
  int64_t* tokens;
};

// The rows of a slot, as lhcompile/ssm.py pairs them: n and n + order / 2; the last row of an odd order is alone.
inline int64_t pairs_of(int64_t order) { return order / 2; }

}  // namespace lhcompile
