// HyenaMixer on a GPU, many tokens, in chunks of L: first every chunk but the last computes what its tokens leave
// behind, starting from zero; then every chunk adds up the state it starts with, s_{c+1} = A^L s_c + E_c, and computes
// its outputs.
#pragma once

#include "mixer_tables.cuh"

namespace lhcompile {

// A chunk's place and the memory of its threads: tables, states [order] and the last tokens [taps][3], a column each.
struct Column {
  const float* tables;
  float *states, *window;
  int width;  // from one row to the next
  int64_t row, channel;
};

__device__ inline float& cell(float* rows, int width, int row) { return rows[row * width]; }

// The next state, and what is heard of it.
__device__ inline float advance(const MixerArgs& a, const Rows& rows, const Column& at, float u) {
  const int half = static_cast<int>(a.order / 2), w = at.width;
  const float *own = at.tables + rows.own * w, *other = at.tables + rows.other * w, *out = at.tables + rows.readout * w;
  float y = at.tables[rows.direct * w] * u;
  for (int n = 0; n < half; n++) {
    const int m = n + half;
    const float upper = at.states[n * w], lower = at.states[m * w];
    const float next = own[n * w] * upper + other[n * w] * lower + u;
    const float last = own[m * w] * lower + other[m * w] * upper + u;
    at.states[n * w] = next, at.states[m * w] = last;
    y += out[n * w] * next + out[m * w] * last;
  }
  if (a.order % 2) {
    const int n = 2 * half;
    const float next = (own[n * w] + other[n * w]) * at.states[n * w] + u;
    at.states[n * w] = next;
    y += out[n * w] * next;
  }
  return y;
}

// Token `time` of the row, counted from the call's first; before that, of the past.
template <typename T>
__device__ inline float token_at(const MixerArgs& a, const Column& at, int64_t place, int64_t time) {
  const int64_t wide = 3 * a.channels, past = a.taps - 1;
  if (time >= 0) return widen(static_cast<const T*>(a.projected)[(at.row * a.time + time) * wide + place]);
  return load_any(a.conv_state, a.conv, (at.row * past + past + time) * wide + place);
}

// Tokens [begin, end) from the states as they are; `said(time, y)` takes the outputs.
template <typename T, typename F>
__device__ inline void run_tokens(const MixerArgs& a, const Rows& rows, const Column& at, int64_t begin, int64_t end,
                                  const F& said) {
  constexpr int kAhead = 4;  // tokens read at once
  const Places place{a.block, a.channels};
  const int w = at.width, taps = static_cast<int>(a.taps);
  const int64_t wide = 3 * a.channels;
  const int64_t places[3] = {place(0, at.channel), place(1, at.channel), place(2, at.channel)};
  for (int j = 0; j + 1 < taps; j++)
    for (int p = 0; p < 3; p++) at.window[(3 * j + p) * w] = token_at<T>(a, at, places[p], begin - (taps - 1) + j);
  int newest = taps - 1;  // the place in the ring where the next token goes
  const T* from = static_cast<const T*>(a.projected) + at.row * a.time * wide;
  for (int64_t base = begin; base < end; base += kAhead) {
    float heard[kAhead][3];
#pragma unroll
    for (int i = 0; i < kAhead; i++)
#pragma unroll
      for (int p = 0; p < 3; p++) heard[i][p] = base + i < end ? widen(from[(base + i) * wide + places[p]]) : 0.0f;
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      if (base + i >= end) break;
      float mixed[3];
#pragma unroll
      for (int p = 0; p < 3; p++) {
        at.window[(3 * newest + p) * w] = heard[i][p];
        mixed[p] = at.tables[(rows.bias + p) * w];
      }
      for (int j = 0, ring = newest + 1; j < taps; j++, ring++) {
        if (ring >= taps) ring -= taps;
#pragma unroll
        for (int p = 0; p < 3; p++) mixed[p] += at.tables[(3 * j + p) * w] * at.window[(3 * ring + p) * w];
      }
      newest = newest + 1 == taps ? 0 : newest + 1;
      const float y = advance(a, rows, at, heard_of(a.outer, mixed[0], mixed[1], mixed[2]));
      said(base + i, y * gate_of(a.outer, mixed[0], mixed[1], mixed[2]));
    }
  }
}

// A^length of every slot of the column, in double precision, by squaring: length is a power of two. → (own, other) of n
__device__ inline void power(const Rows& rows, const Column& at, int n, int m, int64_t length, float (&to)[4]) {
  const int w = at.width;
  double p = at.tables[(rows.own + n) * w], q = at.tables[(rows.other + n) * w];
  double r = at.tables[(rows.own + m) * w], s = at.tables[(rows.other + m) * w];
  for (; length > 1; length /= 2) {
    const double next_p = p * p + q * s, next_q = q * (p + r), next_r = r * r + s * q, next_s = s * (r + p);
    p = next_p, q = next_q, r = next_r, s = next_s;
  }
  to[0] = static_cast<float>(p), to[1] = static_cast<float>(q);
  to[2] = static_cast<float>(r), to[3] = static_cast<float>(s);
}

// The state that chunk `chunk` begins with.
__device__ inline void begin_chunk(const MixerArgs& a, const Rows& rows, const Column& at, const float* ends,
                                   int64_t chunks, int64_t chunk, int64_t length) {
  const int half = static_cast<int>(a.order / 2), w = at.width;
  for (int n = 0; n < a.order; n++) {
    const int place = a.index ? __float_as_int(at.tables[(rows.index + n) * w]) : 0;
    const int64_t where = a.index ? at.row * a.states + place : (at.row * a.order + n) * a.channels + at.channel;
    at.states[n * w] = place < 0 ? 0.0f : load_any(a.state, a.recurrent, where);
  }
  if (chunk == 0) return;
  for (int n = 0; n < a.order; n++) {
    if (n >= half && n < 2 * half) continue;
    const bool alone = n == 2 * half;
    const int m = alone ? n : n + half;
    float step[4];
    if (alone) {
      double whole = static_cast<double>(at.tables[(rows.own + n) * w]) + at.tables[(rows.other + n) * w];
      for (int64_t left = length; left > 1; left /= 2) whole *= whole;
      step[0] = static_cast<float>(whole), step[1] = step[2] = step[3] = 0.0f;
    } else {
      power(rows, at, n, m, length, step);
    }
    float upper = at.states[n * w], lower = at.states[m * w];
    const float* left = ends + (at.row * (chunks - 1) * a.order) * a.channels + at.channel;
    for (int64_t c = 0; c < chunk; c++) {
      const float e = left[(c * a.order + n) * a.channels], f = left[(c * a.order + m) * a.channels];
      const float next = step[0] * upper + step[1] * lower + e;
      lower = step[2] * lower + step[3] * upper + f;
      upper = next;
    }
    at.states[n * w] = upper;
    if (!alone) at.states[m * w] = lower;
  }
}

__device__ inline Column column_of(const MixerArgs& a, const Rows& rows, float* memory) {
  const int width = blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * width;
  fill_tables(a, rows, memory, width, first);
  __syncthreads();
  float* mine = memory + threadIdx.x;
  const auto order = static_cast<int>(a.order);
  return {mine, mine + rows.count * width, mine + (rows.count + order) * width, width, blockIdx.z, first + threadIdx.x};
}

// What the tokens of a chunk leave behind: ends [batch, chunks − 1, order, channels]
template <typename T>
__global__ void chunk_ends(const __grid_constant__ MixerArgs a, float* ends, int64_t chunks, int64_t length) {
  extern __shared__ float4 memory[];
  const Rows rows(a);
  release_next();
  const Column at = column_of(a, rows, reinterpret_cast<float*>(memory));
  await_previous();
  if (at.channel >= a.channels) return;
  const int64_t chunk = blockIdx.y;
  for (int n = 0; n < a.order; n++) cell(at.states, at.width, n) = 0.0f;
  run_tokens<T>(a, rows, at, chunk * length, (chunk + 1) * length, [](int64_t, float) {});
  float* to = ends + ((at.row * (chunks - 1) + chunk) * a.order) * a.channels + at.channel;
  for (int n = 0; n < a.order; n++) to[n * a.channels] = cell(at.states, at.width, n);
}

template <typename T>
__global__ void mix_chunks(const __grid_constant__ MixerArgs a, const float* ends, int64_t chunks, int64_t length) {
  extern __shared__ float4 memory[];
  const Rows rows(a);
  release_next();
  const Column at = column_of(a, rows, reinterpret_cast<float*>(memory));
  await_previous();
  if (at.channel >= a.channels) return;
  const int64_t chunk = blockIdx.y, end = (chunk + 1) * length < a.time ? (chunk + 1) * length : a.time;
  begin_chunk(a, rows, at, ends, chunks, chunk, length);
  T* mixed = static_cast<T*>(a.mixed) + at.row * a.time * a.channels + at.channel;
  run_tokens<T>(a, rows, at, chunk * length, end, [&](int64_t time, float y) { narrow(y, mixed + time * a.channels); });
  if (chunk + 1 < chunks) return;
  const int w = at.width;
  for (int n = 0; n < a.order; n++) {
    const int place = a.index ? __float_as_int(at.tables[(rows.index + n) * w]) : 0;
    const int64_t where = a.index ? at.row * a.states + place : (at.row * a.order + n) * a.channels + at.channel;
    if (place >= 0) store_state(cell(at.states, w, n), a.new_state, a.recurrent, where);
  }
  const Places place{a.block, a.channels};
  const int64_t wide = 3 * a.channels, past = a.taps - 1;
  for (int p = 0; p < 3; p++)
    for (int64_t j = 0; j < past; j++) {
      const int64_t where = place(p, at.channel);
      store_state(token_at<T>(a, at, where, a.time - past + j), a.new_conv_state, a.conv,
                  (at.row * past + j) * wide + where);
    }
}

}  // namespace lhcompile
