// Matrix products by cuBLASLt, which is loaded when it is first needed: onnxruntime's CUDA provider has it loaded.
#pragma once

#include <cstddef>
#include <cstdint>

#include "args.h"

namespace lhcompile {

// y [rows, out] = x [rows, width] · weight [out, width]ᵀ (+ bias [out]) (+ residual [rows, out]), perhaps activated.
struct Product {
  int64_t rows, width, out;
  Type type;    // of residual and y, and of bias
  Type inputs;  // of x and weight
  const void *x, *weight, *bias, *residual;
  const float *x_scale, *weight_scale;  // for e4m3: of each row, and of each output
  bool gelu_tanh;
  void* y;
};

// Null, or what went wrong. The workspace and the choice of algorithm are made in the first call of a shape.
const char* multiply(const Product&, void* stream);

}  // namespace lhcompile
