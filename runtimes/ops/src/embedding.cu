// Embedding on a GPU: a block for each token. The row of a token that is not in the table is zero.
#include "cuda.h"
#include "weights.cuh"

namespace lhcompile {
namespace {

constexpr unsigned kMostThreads = 256;

// Whether the block's token is in the table, and which entry of it that is.
__device__ inline bool find(const EmbeddingArgs& a, int64_t* entry) {
  const int64_t token = a.tokens[blockIdx.x];
  *entry = token < 0 ? token + a.entries : token;
  return *entry >= 0 && *entry < a.entries;
}

// A row has so many words.
template <typename W>
__global__ void __launch_bounds__(kMostThreads) look_up(const __grid_constant__ EmbeddingArgs a, int64_t words) {
  release_next();
  await_previous();
  int64_t entry;
  const bool there = find(a, &entry);
  const W* from = static_cast<const W*>(a.table) + entry * words;
  W* to = static_cast<W*>(a.x) + blockIdx.x * words;
  for (int64_t i = threadIdx.x; i < words; i += blockDim.x) to[i] = there ? from[i] : W{};
}

// A row has so many blocks of 32 codes, whose 16 bytes one thread has.
__global__ void __launch_bounds__(kMostThreads)
    look_up_codes(const __grid_constant__ EmbeddingArgs a, int64_t blocks) {
  release_next();
  await_previous();
  int64_t entry;
  const bool there = find(a, &entry);
  for (int64_t block = threadIdx.x; block < blocks; block += blockDim.x) {
    const int64_t at = entry * blocks + block;
    const auto codes = there ? fetch<uint8_t, 16>(static_cast<const uint8_t*>(a.table) + 16 * at)
                             : Vector<uint8_t, 16>{};
    const float scale = there ? widen(static_cast<const Half*>(a.scale)[at]) : 0.0f;
    store_block<Half, 8>(codes, scale, static_cast<Half*>(a.x) + (blockIdx.x * blocks + block) * kBlock);
  }
}

const char* launch_rows(void (*kernel)(EmbeddingArgs, int64_t), const EmbeddingArgs& a, int64_t each, void* stream) {
  const auto threads = each < kMostThreads ? static_cast<unsigned>(each + 31) / 32 * 32 : kMostThreads;
  return launch(kernel, dim3(static_cast<unsigned>(a.rows)), dim3(threads), 0, stream, a, each);
}

}  // namespace

const char* embedding_cuda(const EmbeddingArgs& a, void* stream) {
  const bool aligned = (reinterpret_cast<uintptr_t>(a.table) | reinterpret_cast<uintptr_t>(a.x)) % 16 == 0;
  if (a.table_type == Type::u8)
    return aligned ? launch_rows(look_up_codes, a, a.width / kBlock, stream)
                   : "EmbeddingInt4 takes a table and x at addresses that 16 divides";
  const int64_t bytes = a.width * size_of(a.table_type);
  if (aligned && bytes % 16 == 0) return launch_rows(look_up<uint4>, a, bytes / 16, stream);
  return launch_rows(look_up<uint16_t>, a, bytes / 2, stream);
}

}  // namespace lhcompile
