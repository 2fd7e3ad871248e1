// HyenaMixer on a GPU, one token: a thread has V neighbouring channels and takes one row after the other, the tables of
// its block's channels in shared memory. A state is read once and written once, by the same thread, so outputs may lie
// where inputs do.
#pragma once

#include "mixer_tables.cuh"

namespace lhcompile {

// What a thread works on: V channels from `channel` on, of one row at a time.
template <typename T, typename C, typename S, int V>
struct Step {
  static constexpr int kPast = 2, kPairs = 2;  // tokens and slots that are read before anything is computed
  const MixerArgs& a;
  const Rows& rows;
  const float* tables;  // the thread's channels
  int width;            // from one row of the tables to the next
  int channel, wide, past, half;
  int places[3];

  Vector<T, V> token[3];
  Vector<C, V> old[kPast][3];
  Vector<S, V> upper[kPairs], lower[kPairs];

  // Rows of the tables, the thread's channels of them at once.
  __device__ Vector<float, V> entries(int row) const { return fetch<float, V>(tables + row * width); }
  __device__ int index(int n, int v) const { return __float_as_int(tables[(rows.index + n) * width + v]); }

  __device__ const T* projected(int64_t row) const { return static_cast<const T*>(a.projected) + row * wide; }
  __device__ const C* before(int64_t row) const { return static_cast<const C*>(a.conv_state) + row * past * wide; }
  __device__ C* after(int64_t row) const { return static_cast<C*>(a.new_conv_state) + row * past * wide; }

  __device__ Vector<S, V> state(int64_t row, int n) const {
    const S* from = static_cast<const S*>(a.state);
    const int64_t rectangle = row * a.order * a.channels + n * static_cast<int>(a.channels) + channel;
    if (!a.index) return fetch<S, V>(from + rectangle);
    Vector<S, V> found;
#pragma unroll
    for (int v = 0; v < V; v++) {
      const int place = index(n, v);
      if (place < 0) {
        narrow(0.0f, &found.element[v]);
      } else {
        found.element[v] = from[row * a.states + place];
      }
    }
    return found;
  }
  __device__ void keep(int64_t row, int n, const Vector<float, V>& next) const {
    S* to = static_cast<S*>(a.new_state);
    if (!a.index)
      return store<S, V>(next.element, to + row * a.order * a.channels + n * static_cast<int>(a.channels) + channel);
#pragma unroll
    for (int v = 0; v < V; v++)
      if (index(n, v) >= 0) narrow(next.element[v], to + row * a.states + index(n, v));
  }

  __device__ void read_past(int64_t row, int base) {
#pragma unroll
    for (int j = 0; j < kPast; j++)
      if (base + j < past)
#pragma unroll
        for (int p = 0; p < 3; p++) old[j][p] = fetch<C, V>(before(row) + (base + j) * wide + places[p]);
  }
  __device__ void read_states(int64_t row, int base) {
#pragma unroll
    for (int j = 0; j < kPairs; j++)
      if (base + j < half) upper[j] = state(row, base + j), lower[j] = state(row, base + j + half);
  }
  // Everything a common row needs is on its way before anything waits for it.
  __device__ void read(int64_t row) {
#pragma unroll
    for (int p = 0; p < 3; p++) token[p] = fetch<T, V>(projected(row) + places[p]);
    read_past(row, 0);
    read_states(row, 0);
  }

  // The short convolution, which also moves the past along: → the three parts
  __device__ void convolve(int64_t row, float (&mixed)[3][V]) {
#pragma unroll
    for (int p = 0; p < 3; p++) {
      const Vector<float, V> bias = entries(rows.bias + p), weight = entries(3 * past + p);
#pragma unroll
      for (int v = 0; v < V; v++) mixed[p][v] = bias.element[v] + weight.element[v] * widen(token[p].element[v]);
    }
    for (int base = 0; base < past; base += kPast) {
      if (base > 0) read_past(row, base);
#pragma unroll
      for (int j = 0; j < kPast; j++)
        if (base + j < past)
#pragma unroll
          for (int p = 0; p < 3; p++) {
            const Vector<float, V> weight = entries(3 * (base + j) + p);
#pragma unroll
            for (int v = 0; v < V; v++) mixed[p][v] += weight.element[v] * widen(old[j][p].element[v]);
            if (base + j > 0) put(old[j][p], after(row) + (base + j - 1) * wide + places[p]);
          }
    }
    if (past == 0) return;
#pragma unroll
    for (int p = 0; p < 3; p++) {
      float last[V];
#pragma unroll
      for (int v = 0; v < V; v++) last[v] = widen(token[p].element[v]);
      store<C, V>(last, after(row) + (past - 1) * wide + places[p]);
    }
  }

  // The next value of state n, whose partner is `partner`; what is heard of it is added to y.
  __device__ Vector<float, V> next_of(int n, const float (&s)[V], const float (&partner)[V], const float (&u)[V],
                                      float (&y)[V]) const {
    const Vector<float, V> own = entries(rows.own + n), other = entries(rows.other + n),
                           out = entries(rows.readout + n);
    Vector<float, V> next;
#pragma unroll
    for (int v = 0; v < V; v++) {
      next.element[v] = own.element[v] * s[v] + other.element[v] * partner[v] + u[v];
      y[v] += out.element[v] * next.element[v];
    }
    return next;
  }

  // All states; u is what the system hears → y
  __device__ void advance(int64_t row, const float (&u)[V], float (&y)[V]) {
    const Vector<float, V> direct = entries(rows.direct);
#pragma unroll
    for (int v = 0; v < V; v++) y[v] = direct.element[v] * u[v];
    for (int base = 0; base < half; base += kPairs) {
      if (base > 0) read_states(row, base);
#pragma unroll
      for (int j = 0; j < kPairs; j++)
        if (base + j < half) {
          const int n = base + j, m = n + half;
          float s[V], t[V];
          widen(upper[j], s);
          widen(lower[j], t);
          keep(row, n, next_of(n, s, t, u, y));
          keep(row, m, next_of(m, t, s, u, y));
        }
    }
    if (a.order % 2 == 0) return;
    const int n = 2 * half;
    float alone[V];
    widen(state(row, n), alone);
    keep(row, n, next_of(n, alone, alone, u, y));
  }

  __device__ void run(int64_t row) {
    float mixed[3][V], u[V], y[V];
    read(row);
    convolve(row, mixed);
#pragma unroll
    for (int v = 0; v < V; v++) u[v] = heard_of(a.outer, mixed[0][v], mixed[1][v], mixed[2][v]);
    advance(row, u, y);
#pragma unroll
    for (int v = 0; v < V; v++) y[v] *= gate_of(a.outer, mixed[0][v], mixed[1][v], mixed[2][v]);
    store<T, V>(y, static_cast<T*>(a.mixed) + row * a.channels + channel);
  }
};

template <typename T, typename C, typename S, int V>
__global__ void __launch_bounds__(kLanes* kRowsAtOnce, V == 4 ? 2 : 4)
    mix_one(const __grid_constant__ MixerArgs a, int rows_each) {
  extern __shared__ float4 memory[];
  float* all = reinterpret_cast<float*>(memory);
  const Rows rows(a);
  const int width = blockDim.x * V;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * width, c = first + threadIdx.x * V;
  release_next();
  fill_tables(a, rows, all, width, first);
  __syncthreads();
  await_previous();
  if (c >= a.channels) return;
  const Places place{a.block, a.channels};
  Step<T, C, S, V> step{a,
                        rows,
                        all + threadIdx.x * V,
                        width,
                        static_cast<int>(c),
                        static_cast<int>(3 * a.channels),
                        static_cast<int>(a.taps - 1),
                        static_cast<int>(a.order / 2),
                        {static_cast<int>(place(0, c)), static_cast<int>(place(1, c)), static_cast<int>(place(2, c))}};
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * rows_each;
  const int64_t end = begin + rows_each < a.batch ? begin + rows_each : a.batch;
  for (int64_t row = begin + threadIdx.y; row < end; row += blockDim.y) step.run(row);
}

}  // namespace lhcompile
