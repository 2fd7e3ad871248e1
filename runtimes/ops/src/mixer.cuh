// HyenaMixer and HyenaStep on a GPU, for one type of signal; mixer_f32.cu, mixer_f16.cu and mixer_bf16.cu have one
// each.
#pragma once

#include "cuda.h"
#include "mixer_many.cuh"
#include "mixer_one.cuh"

namespace lhcompile {

template <typename T, typename C, typename S, int V, bool kApart>
auto one_of(const MixerArgs& a) {
  if (a.taps == 3) return a.index ? mix_one<T, C, S, V, 3, true, kApart> : mix_one<T, C, S, V, 3, false, kApart>;
  return a.index ? mix_one<T, C, S, V, 0, true, kApart> : mix_one<T, C, S, V, 0, false, kApart>;
}

template <typename T, typename C, typename S, int V>
const char* launch_one(const MixerArgs& a, void* stream) {
  int lanes = kLanes;
  auto shared = [&] { return static_cast<size_t>(Rows(a).count) * lanes * V * 4; };
  while (V == 1 && shared() > static_cast<size_t>(gpu().shared) && lanes > 1) lanes /= 2;
  const int64_t tiles = (a.channels + lanes * V - 1) / (lanes * V);
  const int64_t together = a.batch < kRowsAtOnce ? a.batch : kRowsAtOnce;  // rows of a block at a time
  const int64_t groups = (a.batch + together - 1) / together;
  const int64_t most = gpu().processors * kResident<V> / tiles > 0 ? gpu().processors * kResident<V> / tiles : 1;
  const int64_t each = (groups + most - 1) / most;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>((groups + each - 1) / each));
  auto kernel = one_of<T, C, S, V, false>(a);
  if constexpr (std::is_same_v<T, C>)
    if (a.past[0]) kernel = one_of<T, C, S, V, true>(a);
  return launch(kernel, grid, dim3(lanes, static_cast<unsigned>(together)), shared(), stream, a);
}

// Four channels a thread, unless they are apart, their tables too large, or the rows too few to keep the GPU busy.
template <typename T, typename C, typename S>
const char* launch_vectors(const MixerArgs& a, void* stream) {
  constexpr int64_t kFew = 32;
  auto even = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; };
  bool aligned = even(a.projected) && even(a.conv_state) && even(a.state) && even(a.mixed) &&
                 even(a.new_conv_state) && even(a.new_state);
  for (const void* token : a.past) aligned = aligned && even(token);
  const bool fits =
      static_cast<size_t>(Rows(a).count) * kLanes * 16 <= static_cast<size_t>(gpu().shared) / kResident<4>;
  const bool four = a.block % 4 == 0 && aligned && fits && a.batch >= kFew;
  return four ? launch_one<T, C, S, 4>(a, stream) : launch_one<T, C, S, 1>(a, stream);
}

template <typename T, typename C>
const char* launch_states(const MixerArgs& a, void* stream) {
  if (a.recurrent == Type::f16) return launch_vectors<T, C, Half>(a, stream);
  if (a.recurrent == Type::bf16) return launch_vectors<T, C, Brain>(a, stream);
  return launch_vectors<T, C, float>(a, stream);
}

struct Chunks {
  int64_t count, length;
};

inline Chunks chunks_of(const MixerArgs& a) {
  constexpr int64_t kThreads = 132 * 1024, kShortest = 16, kMost = 32;
  int64_t wanted = kThreads / (a.batch * a.channels);
  wanted = wanted < 1 ? 1 : wanted > kMost ? kMost : wanted;
  int64_t length = kShortest;
  while (length * wanted < a.time) length *= 2;
  return {(a.time + length - 1) / length, length};
}

template <typename T>
const char* launch_many(const MixerArgs& a, void* scratch, void* stream) {
  const Rows rows(a);
  int width = 128;
  auto shared = [&] { return static_cast<size_t>(rows.count + a.order + 3 * a.taps) * width * 4; };
  while (shared() > static_cast<size_t>(gpu().shared) && width > 1) width /= 2;
  const Chunks chunks = chunks_of(a);
  const auto tiles = static_cast<unsigned>((a.channels + width - 1) / width), batch = static_cast<unsigned>(a.batch);
  auto* ends = static_cast<float*>(scratch);
  if (chunks.count > 1) {
    const dim3 grid(tiles, static_cast<unsigned>(chunks.count - 1), batch);
    if (const char* problem =
            launch(chunk_ends<T>, grid, dim3(width), shared(), stream, a, ends, chunks.count, chunks.length))
      return problem;
  }
  const dim3 grid(tiles, static_cast<unsigned>(chunks.count), batch);
  return launch(mix_chunks<T>, grid, dim3(width), shared(), stream, a, ends, chunks.count, chunks.length);
}

template <typename T>
const char* mix(const MixerArgs& a, void* scratch, void* stream) {
  if (a.time > 1) return launch_many<T>(a, scratch, stream);
  if (a.conv == Type::f16) return launch_states<T, Half>(a, stream);
  if (a.conv == Type::bf16) return launch_states<T, Brain>(a, stream);
  return launch_states<T, float>(a, stream);
}

}  // namespace lhcompile
