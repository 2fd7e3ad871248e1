// Products on the tensor cores of compute capability 9.0, for what cuBLASLt has no kernel for, or slow ones.
#pragma once

#include <atomic>

#include "args.h"

namespace lhcompile {

// y [rows, out] = residual + activation((x · weightᵀ) ∘ x_unit ∘ weight_scale + bias), x and its units as they enter the
// product: norms are done. Products are asynchronous on `stream`; they return null, or what went wrong.

// From some hundred rows on: x, weight and y are codes, there is no residual. Sizes are those of 16-byte vectors, and
// addresses have to be too.
bool eight_serves(int64_t width, int64_t out);
const char* eight_cuda(const LinearArgs&, void* stream);

// For up to 64 rows of 16 or 8 bits, 96 of 4: x a signal or codes, y a signal, or codes where it has units.
bool tens_serves(const LinearArgs&);
const char* tens_cuda(const LinearArgs&, void* stream);

// In tests: a device that lacks the instructions.
inline std::atomic<bool> is_withheld{false};

}  // namespace lhcompile
