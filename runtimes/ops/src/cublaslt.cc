#include "cublaslt.h"

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <library_types.h>

#include <map>
#include <mutex>
#include <string>
#include <tuple>

namespace lhcompile {
namespace {

// The part of cuBLASLt's binary interface that is used here, so that building needs no package of it.
using Handle = void*;
using Object = void*;  // a description of a matrix, a product or a preference
struct Algorithm {
  uint64_t data[8];
};
struct Found {
  Algorithm algorithm;
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
};

constexpr int kCompute32F = 68, kTransposed = 1;
constexpr int kTransA = 3, kEpilogue = 7, kBiasPointer = 8, kScaleA = 17, kScaleB = 18, kFastSums = 25, kBiasType = 26;
constexpr int kScaleModeA = 31, kScaleModeB = 32, kOuterVector = 3;  // one scale for each row of a matrix
constexpr int kNothing = 1, kBias = 4, kGelu = 32;                   // epilogues; they add up
constexpr int kMaxWorkspace = 1;
constexpr int kAlgorithmTile = 1, kTile256x128 = 24;
constexpr size_t kWorkspace = 32u << 20;

struct Library {
  int (*create)(Handle*);
  int (*describe)(Object*, int compute, int scale);
  int (*describe_set)(Object, int attribute, const void*, size_t);
  int (*describe_end)(Object);
  int (*layout)(Object*, int type, uint64_t rows, uint64_t columns, int64_t leading);
  int (*layout_end)(Object);
  int (*prefer)(Object*);
  int (*prefer_set)(Object, int attribute, const void*, size_t);
  int (*prefer_end)(Object);
  int (*choose)(Handle, Object, Object, Object, Object, Object, Object, int, Found*, int*);
  int (*algorithm_get)(const Algorithm*, int attribute, void*, size_t, size_t*);
  int (*multiply)(Handle, Object, const void*, const void*, Object, const void*, Object, const void*, const void*,
                  Object, void*, Object, const Algorithm*, void*, size_t, cudaStream_t);
  const char* problem = nullptr;

  Library() {
    void* loaded = nullptr;
    for (int flags : {RTLD_LAZY | RTLD_NOLOAD, RTLD_LAZY})
      for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"})
        if (!loaded) loaded = dlopen(name, flags);
    if (!loaded) {
      problem = "neither libcublasLt.so.13 nor libcublasLt.so.12 is found";
      return;
    }
    find(loaded, "cublasLtCreate", create);
    find(loaded, "cublasLtMatmulDescCreate", describe);
    find(loaded, "cublasLtMatmulDescSetAttribute", describe_set);
    find(loaded, "cublasLtMatmulDescDestroy", describe_end);
    find(loaded, "cublasLtMatrixLayoutCreate", layout);
    find(loaded, "cublasLtMatrixLayoutDestroy", layout_end);
    find(loaded, "cublasLtMatmulPreferenceCreate", prefer);
    find(loaded, "cublasLtMatmulPreferenceSetAttribute", prefer_set);
    find(loaded, "cublasLtMatmulPreferenceDestroy", prefer_end);
    find(loaded, "cublasLtMatmulAlgoGetHeuristic", choose);
    find(loaded, "cublasLtMatmulAlgoConfigGetAttribute", algorithm_get);
    find(loaded, "cublasLtMatmul", multiply);
  }

  template <typename F>
  void find(void* loaded, const char* name, F& to) {
    to = reinterpret_cast<F>(dlsym(loaded, name));
    if (!to) problem = "cuBLASLt lacks a function";
  }
};

const Library& library() {
  static const Library one;
  return one;
}

int cuda_type(Type type) {
  switch (type) {
    case Type::f16:
      return CUDA_R_16F;
    case Type::bf16:
      return CUDA_R_16BF;
    case Type::e4m3:
      return CUDA_R_8F_E4M3;
    default:
      return CUDA_R_32F;
  }
}

// A product of one shape, ready to be called; in column-major terms yᵀ = weight · xᵀ.
struct Plan {
  Object product = nullptr, weight = nullptr, x = nullptr, y = nullptr;
  Algorithm algorithm{};
  bool ready = false;
};

using Key = std::tuple<int, int64_t, int64_t, int64_t, Type, Type, bool, bool, bool, bool>;

struct Device {
  std::mutex lock;
  std::map<int, Handle> handles;  // by device
  std::map<Key, Plan> plans;
  std::map<std::pair<int, void*>, void*> workspaces;  // by device and stream: products on one stream take turns
};

Device& state() {
  static Device one;
  return one;
}

// Also while a stream is being captured.
void* allocate() {
  void* memory = nullptr;
  auto mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (cudaMalloc(&memory, kWorkspace) != cudaSuccess) memory = nullptr;
  cudaThreadExchangeStreamCaptureMode(&mode);
  return memory;
}

int epilogue_of(const Product& p) {
  const int wanted = (p.bias ? kBias : 0) + (p.gelu_tanh ? kGelu : 0);
  return wanted ? wanted : kNothing;
}

// The place of the algorithm to take. Large products run at the limit of power, where large tiles, which read each
// number the fewest times, are fastest: cuBLASLt has some of its own before them.
int best_of(const Product& p, const Found* found, int count) {
  constexpr int64_t kManyRows = 4096;
  if (p.rows < kManyRows || size_of(p.inputs) != 2) return 0;
  for (int place = 0; place < count; place++) {
    uint32_t tile = 0;
    size_t size = 0;
    const int failed = library().algorithm_get(&found[place].algorithm, kAlgorithmTile, &tile, sizeof(tile), &size);
    if (!failed && tile == kTile256x128) return place;
  }
  return 0;
}

const char* prepare(const Product& p, Handle handle, Plan& plan) {
  const Library& lt = library();
  int failed = lt.describe(&plan.product, kCompute32F, CUDA_R_32F);
  const int transposed = kTransposed, epilogue = epilogue_of(p), bias = cuda_type(p.type), mode = kOuterVector;
  const int8_t fast = 1;
  auto set = [&](int attribute, const auto& value) {
    if (!failed) failed = lt.describe_set(plan.product, attribute, &value, sizeof(value));
  };
  set(kTransA, transposed);
  set(kEpilogue, epilogue);
  if (p.bias) {
    set(kBiasType, bias);
    set(kBiasPointer, p.bias);
  }
  if (p.x_scale) {
    set(kScaleModeA, mode);
    set(kScaleModeB, mode);
    set(kScaleA, p.weight_scale);
    set(kScaleB, p.x_scale);
    set(kFastSums, fast);  // parts of sums keep 14 bits: far more than numbers that are rounded to 8 bits do
  }
  const auto rows = static_cast<uint64_t>(p.rows), width = static_cast<uint64_t>(p.width),
             out = static_cast<uint64_t>(p.out);
  if (!failed) failed = lt.layout(&plan.weight, cuda_type(p.inputs), width, out, p.width);
  if (!failed) failed = lt.layout(&plan.x, cuda_type(p.inputs), width, rows, p.width);
  if (!failed) failed = lt.layout(&plan.y, cuda_type(p.type), out, rows, p.out);
  Object preference = nullptr;
  const size_t most = kWorkspace;
  if (!failed) failed = lt.prefer(&preference);
  if (!failed) failed = lt.prefer_set(preference, kMaxWorkspace, &most, sizeof(most));
  constexpr int kCandidates = 8;
  Found found[kCandidates] = {};
  int count = 0;
  auto choose = [&] {
    return lt.choose(handle, plan.product, plan.weight, plan.x, plan.y, plan.y, preference, kCandidates, found,
                     &count);
  };
  const bool described = !failed;
  if (!failed) failed = choose();
  if (p.x_scale && described && (failed || count == 0)) {  // few shapes have no such algorithm
    const int8_t whole = 0;
    failed = lt.describe_set(plan.product, kFastSums, &whole, sizeof(whole));
    if (!failed) failed = choose();
  }
  if (preference) lt.prefer_end(preference);
  if (failed || count == 0) return "cuBLASLt has no algorithm for a product";
  plan.algorithm = found[best_of(p, found, count)].algorithm;
  plan.ready = true;
  return nullptr;
}

}  // namespace

const char* multiply(const Product& p, void* stream) {
  const Library& lt = library();
  if (lt.problem) return lt.problem;
  Device& all = state();
  const std::lock_guard<std::mutex> guard(all.lock);
  int device = 0;
  cudaGetDevice(&device);
  Handle& handle = all.handles[device];
  if (!handle && lt.create(&handle)) return "cuBLASLt cannot be initialized";
  void*& workspace = all.workspaces[{device, stream}];
  if (!workspace) workspace = allocate();
  if (!workspace) return "no memory for cuBLASLt's workspace";
  const Key key{device,
                p.rows,
                p.width,
                p.out,
                p.type,
                p.inputs,
                p.bias != nullptr,
                p.residual != nullptr,
                p.gelu_tanh,
                p.x_scale != nullptr};
  Plan& plan = all.plans[key];
  if (!plan.ready)
    if (const char* problem = prepare(p, handle, plan)) return problem;
  int failed = 0;
  auto set = [&](int attribute, const void* const& value) {
    if (!failed) failed = lt.describe_set(plan.product, attribute, &value, sizeof(value));
  };
  if (p.bias) set(kBiasPointer, p.bias);
  if (p.x_scale) {
    set(kScaleA, p.weight_scale);
    set(kScaleB, p.x_scale);
  }
  const float one = 1.0f, beta = p.residual ? 1.0f : 0.0f;
  if (!failed)
    failed = lt.multiply(handle, plan.product, &one, p.weight, plan.weight, p.x, plan.x, &beta,
                         p.residual ? p.residual : p.y, plan.y, p.y, plan.y, &plan.algorithm, workspace, kWorkspace,
                         static_cast<cudaStream_t>(stream));
  return failed ? "a product of cuBLASLt failed" : nullptr;
}

}  // namespace lhcompile
