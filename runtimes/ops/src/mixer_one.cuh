// HyenaMixer and HyenaStep on a GPU, one token: a thread has V neighbouring channels and takes one row after the other,
// the tables of its block's channels in shared memory. A state is read once and written once, by the same thread, so
// outputs may lie where inputs do.
#pragma once

#include "mixer_tables.cuh"

namespace lhcompile {

// What a thread works on: V channels from `channel` on, of one row at a time. kTaps: of the short convolution, 0 where
// they are counted at run time only; kPacked: states lie where an index says; kApart: the past is one tensor a token.
template <typename T, typename C, typename S, int V, int kTaps, bool kPacked, bool kApart>
struct Step {
  static constexpr int kPast = 2, kPairs = 2;  // tokens and pairs of states that are read at once
  const MixerArgs& a;
  const Rows& rows;
  const float* tables;  // the thread's channels
  int width;            // from one row of the tables to the next
  int channel, first;   // first: where its first part lies in a token; the others follow in steps of `a.block`
  int channels, part, wide, half;

  // A row at this thread's channels, and what is read of it: the first of the past and of the states, others in turn.
  struct Row {
    int64_t place;  // in the past, and where that is moved to
    const S* state_at;
    S* next_at;
    T* mixed_at;
    Bits<T, V> token[3];
    Bits<C, V> old[kPast][3];
    Bits<S, V> upper[kPairs], lower[kPairs], alone;
  };

  __device__ Step(const MixerArgs& a_, const Rows& rows_, const float* tables_, int width_, int channel_)
      : a(a_), rows(rows_), tables(tables_), width(width_), channel(channel_) {
    channels = static_cast<int>(a.channels), part = static_cast<int>(a.block), wide = 3 * channels;
    half = static_cast<int>(a.order / 2);
    first = static_cast<int>(Places{a.block, a.channels}(0, channel));
  }
  __device__ int past() const { return kTaps ? kTaps - 1 : static_cast<int>(a.taps) - 1; }

  // Rows of the tables, the thread's channels of them at once.
  __device__ Vector<float, V> entries(int row) const { return fetch<float, V>(tables + row * width); }
  __device__ int index(int n, int v) const { return __float_as_int(tables[(rows.index + n) * width + v]); }

  __device__ Bits<S, V> state(const Row& row, int n) const {
    if constexpr (kPacked) {
      Vector<S, V> found;
#pragma unroll
      for (int v = 0; v < V; v++) {
        const int place = index(n, v);
        if (place < 0) {
          narrow(0.0f, &found.element[v]);
        } else {
          found.element[v] = row.state_at[place];
        }
      }
      Bits<S, V> bits;
      memcpy(&bits, &found, sizeof(bits));
      return bits;
    } else {
      return fetch_bits<S, V>(row.state_at + n * channels);
    }
  }
  __device__ void keep(const Row& row, int n, const Vector<float, V>& next) const {
    Vector<S, V> kept;
    narrow_state(next.element, &kept);
    if constexpr (kPacked) {
#pragma unroll
      for (int v = 0; v < V; v++)
        if (index(n, v) >= 0) row.next_at[index(n, v)] = kept.element[v];
    } else {
      put_away(kept, row.next_at + n * channels);
    }
  }

  __device__ void read_past(Row& row, int base) const {
#pragma unroll
    for (int j = 0; j < kPast; j++)
      if (base + j < past())
#pragma unroll
        for (int p = 0; p < 3; p++) row.old[j][p] = fetch_bits<C, V>(old_of(row, base + j) + p * part);
  }
  __device__ const C* old_of(const Row& row, int n) const {
    if constexpr (kApart) return static_cast<const C*>(a.past[n]) + row.place;
    return static_cast<const C*>(a.conv_state) + row.place + n * wide;
  }
  __device__ void read_states(Row& row, int base) const {
#pragma unroll
    for (int j = 0; j < kPairs; j++)
      if (base + j < half) row.upper[j] = state(row, base + j), row.lower[j] = state(row, base + j + half);
  }
  __device__ void find(int64_t number, Row& row) const {
    row.place = number * (kApart ? 1 : past()) * wide + first;
    const int64_t states_at = kPacked ? number * a.states : number * a.order * channels + channel;
    row.state_at = static_cast<const S*>(a.state) + states_at;
    row.next_at = static_cast<S*>(a.new_state) + states_at;
  }
  // What a row will need of past and states comes into the cache that all multiprocessors share: nothing is read yet.
  __device__ void expect(int64_t number) const {
    Row row;
    find(number, row);
    for (int n = 0; n < past(); n++)
#pragma unroll
      for (int p = 0; p < 3; p++) fetch_ahead(old_of(row, n) + p * part);
    if constexpr (!kPacked)
      for (int n = 0; n < a.order; n++) fetch_ahead(row.state_at + n * channels);
  }
  // Everything a common row needs is on its way before anything waits for it.
  __device__ void read(int64_t number, Row& row) const {
    find(number, row);
    row.mixed_at = static_cast<T*>(a.mixed) + number * channels + channel;
    const T* token_at = static_cast<const T*>(a.projected) + number * wide + first;
#pragma unroll
    for (int p = 0; p < 3; p++) row.token[p] = fetch_bits<T, V>(token_at + p * part);
    read_past(row, 0);
    read_states(row, 0);
    if (a.order % 2) row.alone = state(row, 2 * half);
  }

  __device__ C* moved_at(const Row& row, int n) const {
    return static_cast<C*>(a.new_conv_state) + row.place + n * wide;
  }

  // The short convolution, which also moves the past along: → the three parts
  __device__ void convolve(Row& row, float (&mixed)[3][V]) const {
    float last[3][V];
#pragma unroll
    for (int p = 0; p < 3; p++) {
      const Vector<float, V> bias = entries(rows.bias + p), weight = entries(3 * past() + p);
      widen(numbers<T, V>(row.token[p]), last[p]);
#pragma unroll
      for (int v = 0; v < V; v++) mixed[p][v] = bias.element[v] + weight.element[v] * last[p][v];
    }
    for (int base = 0; base < past(); base += kPast) {
      if (base > 0) read_past(row, base);
#pragma unroll
      for (int j = 0; j < kPast; j++)
        if (base + j < past())
#pragma unroll
          for (int p = 0; p < 3; p++) {
            const Vector<float, V> weight = entries(3 * (base + j) + p);
            Vector<C, V> before = numbers<C, V>(row.old[j][p]);
            if constexpr (kApart) stop(&before);
#pragma unroll
            for (int v = 0; v < V; v++) mixed[p][v] += weight.element[v] * widen(before.element[v]);
            if (!kApart && base + j > 0)
              *reinterpret_cast<Bits<C, V>*>(moved_at(row, base + j - 1) + p * part) = row.old[j][p];
          }
    }
    if constexpr (!kApart) {
      if (past() == 0) return;
#pragma unroll
      for (int p = 0; p < 3; p++) {
        Vector<C, V> newest;
        narrow_state(last[p], &newest);
        put(newest, moved_at(row, past() - 1) + p * part);
      }
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
      next.element[v] = own.element[v] * s[v] + (other.element[v] * partner[v] + u[v]);
      y[v] += out.element[v] * next.element[v];
    }
    return next;
  }

  // All states; u is what the system hears → y. The next pairs are on their way while some are computed.
  __device__ void advance(Row& row, const float (&u)[V], float (&y)[V]) const {
    const Vector<float, V> direct = entries(rows.direct);
#pragma unroll
    for (int v = 0; v < V; v++) y[v] = direct.element[v] * u[v];
    for (int base = 0; base < half; base += kPairs) {
      float s[kPairs][V], t[kPairs][V];
#pragma unroll
      for (int j = 0; j < kPairs; j++)
        widen(numbers<S, V>(row.upper[j]), s[j]), widen(numbers<S, V>(row.lower[j]), t[j]);
      if (base + kPairs < half) read_states(row, base + kPairs);
#pragma unroll
      for (int j = 0; j < kPairs; j++)
        if (base + j < half) {
          const int n = base + j, m = n + half;
          keep(row, n, next_of(n, s[j], t[j], u, y));
          keep(row, m, next_of(m, t[j], s[j], u, y));
        }
    }
    if (a.order % 2 == 0) return;
    float s[V];
    widen(numbers<S, V>(row.alone), s);
    keep(row, 2 * half, next_of(2 * half, s, s, u, y));
  }

  __device__ void run(Row& row) const {
    float mixed[3][V], u[V], y[V];
    convolve(row, mixed);
#pragma unroll
    for (int v = 0; v < V; v++) u[v] = heard_of(a.outer, mixed[0][v], mixed[1][v], mixed[2][v]);
    advance(row, u, y);
#pragma unroll
    for (int v = 0; v < V; v++) y[v] *= gate_of(a.outer, mixed[0][v], mixed[1][v], mixed[2][v]);
    store<T, V>(y, row.mixed_at);
  }
};

// Blocks of a multiprocessor.
template <int V>
constexpr int kResident = V == 4 ? 2 : 4;

template <typename T, typename C, typename S, int V, int kTaps, bool kPacked, bool kApart>
__global__ void __launch_bounds__(kLanes* kRowsAtOnce, kResident<V>)
    mix_one(const __grid_constant__ MixerArgs a) {
  extern __shared__ float4 memory[];
  float* all = reinterpret_cast<float*>(memory);
  const Rows rows(a);
  const int width = V == 4 ? kLanes * V : blockDim.x * V;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * width, c = first + threadIdx.x * V;
  release_next();
  using Work = Step<T, C, S, V, kTaps, kPacked, kApart>;
  const Work step(a, rows, all + threadIdx.x * V, width, static_cast<int>(c));
  // the last rows come first: their tokens were written last, and are in the cache yet
  int64_t row = a.batch - 1 - (static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y);
  const int64_t apart = static_cast<int64_t>(gridDim.y) * blockDim.y;
  if (row >= 0 && c < a.channels) step.expect(row);
  fill_tables(a, rows, all, width, first);
  __syncthreads();
  await_previous();
  if (c >= a.channels) return;
  typename Work::Row now, next;
  if (row >= 0) step.read(row, next);
  for (; row >= 0; row -= apart) {
    now = next;
    if (row >= apart) step.read(row - apart, next);
    step.run(now);
  }
}

}  // namespace lhcompile
