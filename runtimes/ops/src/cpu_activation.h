// Activations of a vector of floats on a processor.
#pragma once

#include "vector.h"

namespace lhcompile::LEVEL {

// e^x to two units of the last place, for x cut to where float has an inverse too: 2^n times a polynomial in the rest.
inline Floats exponential(Floats x) {
  constexpr float kMost = 87.0f, kRounder = 12582912.0f;  // 1.5 · 2²³: a sum with it has no bits behind the point
  x = x > kMost ? Floats{} + kMost : x;
  x = x < -kMost ? Floats{} - kMost : x;
  const Floats rounded = x * 1.44269504f + kRounder, n = rounded - kRounder;
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two pieces, of which the first is short
  Floats y = r * (1.0f / 720) + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const Ints power = __builtin_convertvector(n, Ints) + 127;
  return y * reinterpret_cast<Floats>(power << 23);
}

// The complementary error function: Chebyshev's fit of W. Press et al., Numerical Recipes, 6.2, to 1.2e-7 of its value but
// for what float loses of the exponent, 4e-6 far out.
inline Floats complementary_error(Floats x) {
  constexpr float kFit[] = {0.17087277f, -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f,
                            -0.18628806f, 0.09678418f, 0.37409196f, 1.00002368f,  -1.26551223f};
  const Floats z = x < 0.0f ? -x : x, t = 1.0f / (1.0f + 0.5f * z);
  Floats fit = Floats{} + kFit[0];
  for (int i = 1; i < 10; i++) fit = fit * t + kFit[i];
  const Floats tail = t * exponential(fit - z * z);
  return x < 0.0f ? 2.0f - tail : tail;
}

inline Floats activated(Activation kind, Floats x) {
  if (kind == Activation::gelu) return 0.5f * x * complementary_error(x * -0.70710678f);
  if (kind == Activation::gelu_tanh) {  // ½ (1 + tanh z) = 1 / (1 + e^−2z), which is zero where e^x is cut
    const Floats y = x / (1.0f + exponential(-1.59576912f * (x + 0.044715f * x * x * x)));
    return x < -10.0f ? x * 0.0f : y;
  }
  return x;
}

}  // namespace lhcompile::LEVEL
