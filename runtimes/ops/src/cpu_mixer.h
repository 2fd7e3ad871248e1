// HyenaMixer and HyenaStep on a processor: a tile of channels of one row at a time, token after token, its states in the
// cache.
#pragma once

#include <algorithm>
#include <vector>

#include "vector.h"

namespace lhcompile::LEVEL {

constexpr int64_t kTile = 64;

// Channels [first, first + count) of a row, and where they lie in the three parts.
struct Tile {
  int64_t row, first, count;
};

inline int64_t tile_size(const MixerArgs& a) { return std::min<int64_t>(kTile, a.block < 16 ? a.channels : a.block); }

// Tiles never cross a block, unless blocks are small.
inline int64_t tiles_of(const MixerArgs& a) {
  const int64_t size = tile_size(a), span = a.block < 16 ? a.channels : a.block;
  return a.channels / span * ((span + size - 1) / size);
}

inline int64_t mixer_items(const MixerArgs& a) { return a.batch * tiles_of(a); }

inline Tile tile_of(const MixerArgs& a, int64_t item) {
  const int64_t size = tile_size(a), span = a.block < 16 ? a.channels : a.block, each = (span + size - 1) / size;
  const int64_t tile = item % tiles_of(a), within = tile % each * size;
  return {item / tiles_of(a), tile / each * span + within, std::min(size, span - within)};
}

inline int64_t place_of(const MixerArgs& a, int64_t part, int64_t channel) {
  return channel / a.block * 3 * a.block + part * a.block + channel % a.block;
}

// A tile's numbers of the three parts, from rows of 3 · channels elements and to those of a state.
template <typename T>
void gather_parts(const MixerArgs& a, const Tile& t, const T* row, float (*to)[kTile]) {
  for (int64_t part = 0; part < 3; part++) {
    if (a.block >= 16) {
      widen_all(row + place_of(a, part, t.first), to[part], t.count);
    } else {
      for (int64_t i = 0; i < t.count; i++) to[part][i] = widen(row[place_of(a, part, t.first + i)]);
    }
  }
}
template <typename T>
void keep_parts(const MixerArgs& a, const Tile& t, const float (*from)[kTile], T* row) {
  for (int64_t part = 0; part < 3; part++) {
    if (a.block >= 16) {
      keep_all(from[part], row + place_of(a, part, t.first), t.count);
    } else {
      for (int64_t i = 0; i < t.count; i++) keep(from[part][i], row + place_of(a, part, t.first + i));
    }
  }
}

// One token: state [order][kTile] is replaced by the next one, u is what the system hears → y
inline void advance(const MixerArgs& a, const Tile& t, float (*state)[kTile], const float* u, float* y) {
  const int64_t half = pairs_of(a.order), n = t.count;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) y[i] = a.direct[t.first + i] * u[i];
  for (int64_t k = 0; k < a.order; k += 1) {
    if (k >= half && k < 2 * half) continue;
    const bool alone = k == 2 * half;
    const float *own = a.own + k * a.channels + t.first, *out = a.readout + k * a.channels + t.first;
    float* s = state[k];
    if (alone) {
      const float* other = a.other ? a.other + k * a.channels + t.first : nullptr;
#pragma GCC ivdep
      for (int64_t i = 0; i < n; i++) {
        s[i] = own[i] * s[i] + (other ? other[i] * s[i] : 0.0f) + u[i];
        y[i] += out[i] * s[i];
      }
      continue;
    }
    const int64_t next = half * a.channels;
    float* p = state[k + half];
    if (!a.other) {
#pragma GCC ivdep
      for (int64_t i = 0; i < n; i++) {
        s[i] = own[i] * s[i] + u[i];
        p[i] = own[next + i] * p[i] + u[i];
        y[i] += out[i] * s[i] + out[next + i] * p[i];
      }
      continue;
    }
    const float* other = a.other + k * a.channels + t.first;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; i++) {
      const float upper = own[i] * s[i] + other[i] * p[i] + u[i];
      const float lower = own[next + i] * p[i] + other[next + i] * s[i] + u[i];
      y[i] += out[i] * upper + out[next + i] * lower;
      s[i] = upper, p[i] = lower;
    }
  }
}

template <typename S>
void load_state(const MixerArgs& a, const Tile& t, float (*to)[kTile]) {
  const S* from = static_cast<const S*>(a.state);
  for (int64_t k = 0; k < a.order; k++) {
    if (!a.index) {
      widen_all(from + (t.row * a.order + k) * a.channels + t.first, to[k], t.count);
      continue;
    }
    const int32_t* index = a.index + k * a.channels + t.first;
    for (int64_t i = 0; i < t.count; i++) to[k][i] = index[i] < 0 ? 0.0f : widen(from[t.row * a.states + index[i]]);
  }
}
template <typename S>
void store_state(const MixerArgs& a, const Tile& t, const float (*from)[kTile]) {
  S* to = static_cast<S*>(a.new_state);
  for (int64_t k = 0; k < a.order; k++) {
    if (!a.index) {
      keep_all(from[k], to + (t.row * a.order + k) * a.channels + t.first, t.count);
      continue;
    }
    const int32_t* index = a.index + k * a.channels + t.first;
    for (int64_t i = 0; i < t.count; i++)
      if (index[i] >= 0) keep(from[k][i], to + t.row * a.states + index[i]);
  }
}

using Parts = float[3][kTile];

// The short convolution of one token; window: the tokens it hears, oldest first.
inline void convolve(const MixerArgs& a, const Tile& t, const Parts* weight, const Parts& bias, Parts* const* window,
                     Parts& to) {
  for (int part = 0; part < 3; part++) {
#pragma GCC ivdep
    for (int64_t i = 0; i < t.count; i++) to[part][i] = bias[part][i];
    for (int64_t k = 0; k < a.taps; k++)
#pragma GCC ivdep
      for (int64_t i = 0; i < t.count; i++) to[part][i] += weight[k][part][i] * (*window[k])[part][i];
  }
}

template <typename T>
void mix_tile(const MixerArgs& a, const Tile& t, float (*state)[kTile], Parts* tokens, Parts* weight) {
  const int64_t wide = 3 * a.channels, past = a.taps - 1;
  std::vector<Parts*> window(static_cast<size_t>(a.taps));
  Parts bias{}, mixed;
  float u[kTile], y[kTile];
  if (a.bias) gather_parts(a, t, a.bias, bias);
  for (int64_t k = 0; k < a.taps; k++) gather_parts(a, t, a.weight + k * wide, weight[k]);
  for (int64_t k = 0; k < past; k++)
    with_type(a.conv, [&](auto* kind) {
      using C = std::remove_pointer_t<decltype(kind)>;
      const auto* from = static_cast<const C*>(a.past[0] ? a.past[k] : a.conv_state);
      gather_parts(a, t, from + (a.past[0] ? t.row : t.row * past + k) * wide, tokens[k]);
      if (a.past[0])
        for (auto& part : tokens[k])
          for (float& x : part) x = stopped<C>(x);
    });
  for (int64_t k = 0; k < a.taps; k++) window[k] = tokens + k;
  const int first = a.outer == 0 ? 1 : 0, second = a.outer == 2 ? 1 : 2;
  for (int64_t time = 0; time < a.time; time++) {
    const int64_t token = t.row * a.time + time;
    gather_parts(a, t, static_cast<const T*>(a.projected) + token * wide, *window[past]);
    convolve(a, t, weight, bias, window.data(), mixed);
#pragma GCC ivdep
    for (int64_t i = 0; i < t.count; i++) u[i] = mixed[first][i] * mixed[second][i];
    advance(a, t, state, u, y);
#pragma GCC ivdep
    for (int64_t i = 0; i < t.count; i++) y[i] *= mixed[a.outer][i];
    narrow_all(y, static_cast<T*>(a.mixed) + token * a.channels + t.first, t.count);
    std::rotate(window.begin(), window.begin() + 1, window.end());
  }
  for (int64_t k = 0; k < past && !a.past[0]; k++)
    with_type(a.conv, [&](auto* kind) {
      using C = std::remove_pointer_t<decltype(kind)>;
      keep_parts(a, t, *window[k], static_cast<C*>(a.new_conv_state) + (t.row * past + k) * wide);
    });
}

inline void mixer(const MixerArgs& a, int64_t first, int64_t last) {
  std::vector<float> memory(static_cast<size_t>((a.order + 6 * a.taps) * kTile));
  auto* state = reinterpret_cast<float (*)[kTile]>(memory.data());
  auto* tokens = reinterpret_cast<Parts*>(memory.data() + a.order * kTile);
  for (int64_t item = first; item < last; item++) {
    const Tile t = tile_of(a, item);
    with_type(a.recurrent, [&](auto* kind) { load_state<std::remove_pointer_t<decltype(kind)>>(a, t, state); });
    with_type(a.signal, [&](auto* kind) {
      mix_tile<std::remove_pointer_t<decltype(kind)>>(a, t, state, tokens, tokens + a.taps);
    });
    with_type(a.recurrent, [&](auto* kind) { store_state<std::remove_pointer_t<decltype(kind)>>(a, t, state); });
  }
}

}  // namespace lhcompile::LEVEL
