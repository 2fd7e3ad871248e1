// Linear on a GPU: a few rows by gemv.cuh and few_rows.cuh; others by products.h or cuBLASLt, with a kernel for the norm
// before them, one that makes numbers of 4-bit codes, and one after cuBLASLt for what it cannot add itself.
#include "cublaslt.h"
#include "cuda.h"
#include "few_rows.cuh"
#include "gemv.cuh"
#include "normalize.cuh"
#include "products.h"

namespace lhcompile {
namespace {

constexpr int kThreads = 256;

// y = residual + activation(product + bias), in codes where they are wanted
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) finish(const __grid_constant__ LinearArgs a, const T* product) {
  release_next();
  await_previous();
  const int64_t place = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (place >= a.rows * a.out) return;
  float each[V], carried[V] = {};
  load<T, V>(product + place, each);
  if (a.residual) load<T, V>(static_cast<const T*>(a.residual) + place, carried);
#pragma unroll
  for (int j = 0; j < V; j++) {
    if (a.bias) each[j] += load_any(a.bias, a.bias_type, place % a.out + j);
    each[j] = activated(a.activation, each[j]) + carried[j];
  }
  if (!a.y_unit) return store<T, V>(each, static_cast<T*>(a.y) + place);
  Vector<uint8_t, V> codes;
#pragma unroll
  for (int j = 0; j < V; j++) codes.element[j] = to_eight(each[j] / a.y_unit[place / a.out]);
  put(codes, static_cast<uint8_t*>(a.y) + place);
}

// The weight of 4-bit codes, [out, width]: a thread has sixteen bytes of codes, which share a scale.
template <typename T>
__global__ void __launch_bounds__(kThreads) expand(const __grid_constant__ LinearArgs a, void* to) {
  release_next();
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool there = block < a.out * (a.width / 32);
  const auto* codes = static_cast<const uint8_t*>(a.weight) + block * 16;
  const float scale = there ? widen(static_cast<const Half*>(a.weight_scale)[block]) : 0.0f;
  const Vector<uint8_t, 16> bytes = there ? fetch<uint8_t, 16>(codes) : Vector<uint8_t, 16>{};
  await_previous();  // which may still read what is written here
  if (!there) return;
  store_block<T, 4>(bytes, scale, static_cast<T*>(to) + block * kBlock);
}

size_t padded(int64_t bytes) { return static_cast<size_t>(bytes + 255) / 256 * 256; }

// Whether x enters the product in codes, but has to be made them.
bool is_to_be_coded(const LinearArgs& a) { return a.weight_type == Type::e4m3 && !a.x_unit; }

// In scratch memory: x as it enters the product, the scales of its rows behind it, then the weight, and the product.
// tens: whether the product is that of products.h for some tens of rows, which reads the weight as it is.
struct Room {
  size_t x = 0, units = 0, weight = 0, product = 0;
  bool tens;
  explicit Room(const LinearArgs& a) {
    const bool eight = is_to_be_coded(a);
    if (a.norm != Norm::none || eight) x = padded(a.rows * a.width * (eight ? 1 : size_of(a.signal)));
    if (eight) units = padded(a.rows * 4);
    LinearArgs entering = a;
    if (x) entering.x = nullptr;  // in scratch memory, which is aligned
    tens = tens_serves(entering);
    if (a.weight_type == Type::u8 && !tens) weight = padded(a.out * a.width * size_of(a.signal));
    if (a.y_unit && !eight_serves(a.width, a.out)) product = padded(a.rows * a.out * size_of(a.signal));
  }
  size_t all() const { return x + units + weight + product; }
};

template <typename T>
const char* many_rows(const LinearArgs& a, void* scratch, void* stream) {
  constexpr int kFew = 16 / sizeof(T);
  const bool eight = a.weight_type == Type::e4m3, four = a.weight_type == Type::u8;
  const Room room(a);
  auto* memory = static_cast<char*>(scratch);
  const void *x = a.x, *weight = a.weight;
  auto* units = room.units ? reinterpret_cast<float*>(memory + room.x) : nullptr;
  const float* x_unit = a.x_unit ? a.x_unit : units;
  if (room.weight) {
    auto* to = memory + room.x + room.units;
    const dim3 grid(static_cast<unsigned>((a.out * (a.width / 32) + kThreads - 1) / kThreads));
    if (const char* problem = launch(expand<T>, grid, dim3(kThreads), 0, stream, a, to)) return problem;
    weight = to;
  }
  if (room.x) {
    if (const char* problem = launch_normalize<T>(a, scratch, units, stream)) return problem;
    x = scratch;
  }
  LinearArgs entering = a;
  entering.x = x, entering.x_unit = x_unit;
  if (room.tens) return tens_cuda(entering, stream);
  if (a.y_unit && !room.product) return eight_cuda(entering, stream);
  auto* product = static_cast<T*>(room.product ? memory + room.x + room.units + room.weight : a.y);
  Product p{};
  p.rows = a.rows, p.width = a.width, p.out = a.out, p.type = a.signal, p.inputs = four ? a.signal : a.weight_type;
  p.x = x, p.weight = weight, p.y = product;
  if (eight) p.x_scale = x_unit, p.weight_scale = static_cast<const float*>(a.weight_scale);
  LinearArgs rest = a;
  if (!a.bias || (a.bias_type == a.signal && !(eight && a.signal == Type::f32))) {  // the product adds it, perhaps more
    p.bias = a.bias, rest.bias = nullptr;
    if (a.activation == Activation::gelu_tanh) p.gelu_tanh = true, rest.activation = Activation::none;
    if (a.activation == Activation::none) p.residual = a.residual, rest.residual = nullptr;
  }
  if (const char* problem = multiply(p, stream)) return problem;
  if (!rest.bias && !rest.residual && rest.activation == Activation::none && !a.y_unit) return nullptr;
  const auto kernel = a.out % kFew ? finish<T, 1> : finish<T, kFew>;
  const int64_t each = kThreads * (a.out % kFew ? 1 : kFew);
  const dim3 grid(static_cast<unsigned>((a.rows * a.out + each - 1) / each));
  return launch(kernel, grid, dim3(kThreads), 0, stream, rest, product);
}

template <typename W, typename T>
const char* streamed_or_many(const LinearArgs& a, void* scratch, void* stream) {
  if (gemv_serves<W>(a)) return launch_gemv<W, T>(a, stream);
  if (few_serves<W>(a) && !tens_serves(a)) return launch_few<W, T>(a, stream);
  return many_rows<T>(a, scratch, stream);
}

template <typename T>
const char* linear(const LinearArgs& a, void* scratch, void* stream) {
  return a.weight_type == Type::e4m3 ? streamed_or_many<Eight, T>(a, scratch, stream)
                                     : streamed_or_many<Plain<T>, T>(a, scratch, stream);
}

}  // namespace

size_t linear_scratch(const LinearArgs& a) { return Room(a).all(); }

const char* linear_cuda(const LinearArgs& a, void* scratch, void* stream) {
  const bool four = a.weight_type == Type::u8;
  if (a.signal == Type::f32) return many_rows<float>(a, scratch, stream);
  if (a.signal == Type::bf16) return four ? many_rows<Brain>(a, scratch, stream) : linear<Brain>(a, scratch, stream);
  return four ? streamed_or_many<Four, Half>(a, scratch, stream) : linear<Half>(a, scratch, stream);
}

}  // namespace lhcompile
