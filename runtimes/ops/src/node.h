// What kernels see of a node of a graph: its inputs, with their shapes checked, memory for a call, and threads.
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <algorithm>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <vector>

#include "args.h"

namespace lhcompile {

enum class Device { cpu, cuda };

using Shape = std::vector<int64_t>;

// otherwise: what is wrong, or a call that says it
template <typename Text>
void require(bool met, const Text& otherwise) {
  if (met) return;
  std::string problem = "lhcompile: ";
  if constexpr (std::is_invocable_v<Text>) {
    problem += otherwise();
  } else {
    problem += otherwise;
  }
  throw Ort::Exception(std::move(problem), ORT_INVALID_ARGUMENT);
}

template <typename Sizes>
std::string text(const Sizes& shape) {
  std::string all = "[";
  for (int64_t size : shape) all += (all.size() > 1 ? ", " : "") + std::to_string(size);
  return all + "]";
}

struct Input {
  Input() = default;
  explicit Input(const Ort::ConstValue& value) {
    if (value == nullptr) return;
    auto info = value.GetTensorTypeAndShapeInfo();
    shape = info.GetShape();
    type = static_cast<Type>(info.GetElementType());
    data = value.GetTensorRawData();
  }
  explicit operator bool() const { return data != nullptr; }
  Shape shape;
  Type type = Type::none;
  const void* data = nullptr;
};

// The inputs of a node that are constants of the graph: they are looked at once.
class Constants {
 public:
  explicit Constants(const OrtKernelInfo* given) {
    const Ort::ConstKernelInfo info(given);
    for (size_t place = 0; place < info.GetInputCount(); place++) {
      int constant = 0;
      const Ort::ConstValue value = info.GetTensorConstantInput(place, &constant);
      known_.push_back(constant ? Input(value) : Input());
    }
  }
  const Input* at(size_t place) const { return place < known_.size() && known_[place] ? &known_[place] : nullptr; }

 private:
  std::vector<Input> known_;
};

// All inputs of a node in one call of it.
class Inputs {
 public:
  Inputs(const Ort::KernelContext& context, const Constants& constants) : context_(context), constants_(constants) {}

  Input operator[](size_t place) const {
    const Input* known = constants_.at(place);
    return known ? *known : Input(context_.GetInput(place));
  }
  // An input that has a shape, if it is there.
  Input shaped(size_t place, const char* name, std::initializer_list<int64_t> shape) const {
    Input given = (*this)[place];
    check(given, name, shape);
    return given;
  }
  const void* data(size_t place, const char* name, std::initializer_list<int64_t> shape) const {
    const Input* known = constants_.at(place);
    if (!known) return shaped(place, name, shape).data;
    check(*known, name, shape);
    return known->data;
  }
  const float* table(size_t place, const char* name, std::initializer_list<int64_t> shape) const {
    return static_cast<const float*>(data(place, name, shape));
  }
  size_t count() const { return context_.GetInputCount(); }

 private:
  static void check(const Input& given, const char* name, std::initializer_list<int64_t> shape) {
    require(!given || std::equal(given.shape.begin(), given.shape.end(), shape.begin(), shape.end()),
            [&] { return std::string(name) + " is " + text(given.shape) + ", expected " + text(shape); });
  }
  const Ort::KernelContext& context_;
  const Constants& constants_;
};

// Device memory for one call, from the session's own allocator.
class Scratch {
 public:
  Scratch(const Ort::KernelContext& context, size_t bytes, Device device) {
    if (bytes == 0) return;
    int id = 0;
    const char* name = "Cpu";
    if (device == Device::cuda) {
      auto place = context.GetInput(0).GetTensorMemoryInfo();
      id = place.GetDeviceId();
      name = "Cuda";
    }
    Ort::MemoryInfo memory(name, OrtDeviceAllocator, id, OrtMemTypeDefault);
    allocator_ = context.GetAllocator(*static_cast<const OrtMemoryInfo*>(memory));
    Ort::ThrowOnError(Ort::GetApi().AllocatorAlloc(allocator_, bytes, &data_));
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (data_) Ort::Status(Ort::GetApi().AllocatorFree(allocator_, data_));
  }
  void* data() const { return data_; }

 private:
  OrtAllocator* allocator_ = nullptr;
  void* data_ = nullptr;
};

template <typename F>
void parallel(const Ort::KernelContext& context, int64_t items, const F& work) {
  if (items == 1) return work(0);
  auto call = [](void* given, size_t item) { (*static_cast<const F*>(given))(static_cast<int64_t>(item)); };
  context.ParallelFor(call, static_cast<size_t>(items), 0, const_cast<F*>(&work));
}

[[maybe_unused]] inline void require_done(const char* problem) {
  if (problem) throw Ort::Exception(std::string("lhcompile: ") + problem, ORT_FAIL);
}

}  // namespace lhcompile
