// A product in 8 bits whose outputs are activated and written in 8 bits, which cuBLASLt has no kernel for.
#pragma once

#include "args.h"

namespace lhcompile {

// y [rows, out] = round(activation((x · weightᵀ) ∘ x_unit ∘ weight_unit + bias) / y_unit), all codes e4m3: x [rows,
// width], weight [out, width]; x_unit and y_unit [rows], weight_unit [out], bias [out] or null.
struct EightArgs {
  int64_t rows, width, out;
  Type bias_type;
  Activation activation;
  const void *x, *weight, *bias;
  const float *x_unit, *weight_unit, *y_unit;
  void* y;
};

// Whether the current device has the instructions, and sizes are those of 16-byte vectors. Addresses have to be too.
bool eight_serves(int64_t width, int64_t out);
// In tests: a device that lacks them.
void eight_withhold(bool withheld);
// Asynchronous on `stream`. Null, or what went wrong.
const char* eight_cuda(const EightArgs&, void* stream);

}  // namespace lhcompile
