// Embedding on a processor. All tokens are in the table.
#pragma once

#include <cstring>

#include "vector.h"

namespace lhcompile::LEVEL {

inline void embedding(const EmbeddingArgs& a, int64_t first, int64_t last) {
  const bool coded = a.table_type == Type::u8;
  const int64_t bytes = coded ? a.width / 2 : a.width * size_of(a.table_type), blocks = a.width / kBlock;
  for (int64_t row = first; row < last; row++) {
    const int64_t entry = a.tokens[row] < 0 ? a.tokens[row] + a.entries : a.tokens[row];
    const auto* from = static_cast<const uint8_t*>(a.table) + entry * bytes;
    if (!coded) {
      std::memcpy(static_cast<char*>(a.x) + row * bytes, from, static_cast<size_t>(bytes));
      continue;
    }
    const auto* scales = static_cast<const Half*>(a.scale) + entry * blocks;
    auto* to = static_cast<Half*>(a.x) + row * a.width;
    for (int64_t i = 0; i < a.width; i++)
      narrow(widen(scales[i / kBlock]) * static_cast<float>((from[i / 2] >> i % 2 * 4 & 15) - 8), to + i);
  }
}

}  // namespace lhcompile::LEVEL
