// Sample on a processor, in double precision: the order of the logits is settled only where top_k or top_p asks for it.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "vector.h"

namespace lhcompile::LEVEL {

inline int64_t most_likely(const std::vector<double>& logits) {
  return std::max_element(logits.begin(), logits.end()) - logits.begin();
}

// Zero weights for all but the top_k most likely tokens, and of those the fewest that reach top_p.
inline void truncate(const std::vector<double>& logits, int64_t top_k, double top_p, std::vector<double>& weights) {
  const auto vocab = static_cast<int64_t>(logits.size());
  const int64_t most = top_k > 0 ? std::min(top_k, vocab) : vocab;
  if (most == vocab && top_p >= 1) return;
  std::vector<int64_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  auto before = [&](int64_t a, int64_t b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); };
  std::partial_sort(order.begin(), order.begin() + most, order.end(), before);
  double total = 0, reached = 0;
  for (int64_t rank = 0; rank < most; rank++) total += weights[order[rank]];
  int64_t kept = most;
  if (top_p < 1) {
    for (kept = 0; kept < most && reached < top_p; kept++) reached += weights[order[kept]] / total;
  }
  for (int64_t rank = kept; rank < vocab; rank++) weights[order[rank]] = 0;
}

inline int64_t drawn(const std::vector<double>& weights, double uniform) {
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  double edge = 0;
  int64_t last = 0;
  for (size_t id = 0; id < weights.size(); id++) {
    if (weights[id] <= 0) continue;
    edge += weights[id], last = static_cast<int64_t>(id);
    if (edge > uniform * total) break;
  }
  return last;
}

inline void sample(const SampleArgs& a, int64_t first, int64_t last) {
  std::vector<double> logits(static_cast<size_t>(a.vocab)), weights(logits.size());
  for (int64_t row = first; row < last; row++) {
    with_type(a.signal, [&](auto* kind) {
      const auto* from = static_cast<const std::remove_pointer_t<decltype(kind)>*>(a.logits) + row * a.vocab;
      for (int64_t id = 0; id < a.vocab; id++) logits[id] = widen(from[id]);
    });
    const int64_t best = most_likely(logits);
    if (a.temperature[row] == 0) {
      a.tokens[row] = best;
      continue;
    }
    for (int64_t id = 0; id < a.vocab; id++)
      weights[id] = std::exp((logits[id] - logits[best]) / static_cast<double>(a.temperature[row]));
    truncate(logits, a.top_k[row], a.top_p[row], weights);
    a.tokens[row] = drawn(weights, a.uniform[row]);
  }
}

}  // namespace lhcompile::LEVEL
