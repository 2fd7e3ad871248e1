// The operators as onnxruntime knows them: which types there are, what shapes come out, which kernel is called.
#include <deque>
#include <memory>
#include <mutex>

#include "cpu.h"
#include "node.h"
#ifdef LHCOMPILE_CUDA
#include "cuda.h"
#endif

namespace lhcompile {
namespace {

constexpr uint32_t kApi = 21;  // the oldest onnxruntime that serves this library is 1.21

// ---- HyenaMixer, and HyenaStep, whose past is one tensor a token ------------------------------------------------------

template <bool kApart>
struct MixerKernel {
  MixerKernel(const OrtKernelInfo* given, Device on) : device(on), constants(given) {
    Ort::ConstKernelInfo info(given);
    block = info.GetAttribute<int64_t>("block");
    outer = info.GetAttribute<int64_t>("outer");
    require(block > 0 && outer >= 0 && outer < 3,
            [&] { return "HyenaMixer has block " + std::to_string(block) + " and outer " + std::to_string(outer); });
  }

  void Compute(OrtKernelContext* given) {
    Ort::KernelContext context(given);
    const Inputs inputs(context, constants);
    constexpr size_t kState = kApart ? 1 : 2;  // the place of recurrent_state; the tables follow it
    const Input projected = inputs[0], state = inputs[kState];
    require(projected.shape.size() == 3 && projected.shape[2] % 3 == 0 && projected.shape[2] / 3 % block == 0, [&] {
      return "projected is " + text(projected.shape) + ", expected three parts in blocks of " + std::to_string(block);
    });
    MixerArgs args{};
    args.batch = projected.shape[0], args.time = projected.shape[1], args.channels = projected.shape[2] / 3;
    args.block = block, args.outer = outer;
    read_tables(inputs, kState + 1, args);
    if (args.index) {
      require(state.shape.size() >= 2 && state.shape[0] == args.batch,
              [&] { return "recurrent_state is " + text(state.shape); });
      args.states = 1;
      for (size_t axis = 1; axis < state.shape.size(); axis++) args.states *= state.shape[axis];
    } else {
      inputs.shaped(kState, "recurrent_state", {args.batch, args.order, args.channels});
    }
    args.signal = projected.type, args.recurrent = state.type;
    args.projected = projected.data, args.state = state.data;
    args.mixed = context.GetOutput(0, {args.batch, args.time, args.channels}).GetTensorMutableRawData();
    args.new_state = context.GetOutput(kApart ? 1 : 2, state.shape).GetTensorMutableRawData();
    take_past(context, inputs, args);
    if (args.batch == 0 || args.time == 0) {
      require(args.batch == 0, "HyenaMixer takes at least one token");
      return;
    }
    run(context, args);
  }

  void read_tables(const Inputs& inputs, size_t at, MixerArgs& args) {
    const Input weight = inputs[at], own = inputs[at + 2];
    require(weight.shape.size() == 2 && own.shape.size() == 2, "conv_weight and own have two axes");
    args.taps = weight.shape[0], args.order = own.shape[0];
    args.weight = inputs.table(at, "conv_weight", {args.taps, 3 * args.channels});
    args.bias = inputs.table(at + 1, "conv_bias", {3 * args.channels});
    args.own = inputs.table(at + 2, "own", {args.order, args.channels});
    args.other = inputs.table(at + 3, "other", {args.order, args.channels});
    args.readout = inputs.table(at + 4, "readout", {args.order, args.channels});
    args.direct = inputs.table(at + 5, "direct", {args.channels});
    args.index = static_cast<const int32_t*>(inputs.data(at + 6, "index", {args.order, args.channels}));
  }

  void take_past(const Ort::KernelContext& context, const Inputs& inputs, MixerArgs& args) {
    if constexpr (kApart) {
      require(args.time == 1 && args.taps > 1 && args.taps <= kMostPast + 1 &&
                  inputs.count() == static_cast<size_t>(8 + args.taps),
              "HyenaStep takes one token, and behind its tables the last of conv_weight's taps but one");
      args.conv = args.signal;
      for (int64_t n = 0; n + 1 < args.taps; n++)
        args.past[n] =
            inputs.data(static_cast<size_t>(9 + n), "a token of the past", {args.batch, 1, 3 * args.channels});
    } else {
      const Input conv = inputs.shaped(1, "conv_state", {args.batch, args.taps - 1, 3 * args.channels});
      args.conv = conv.type, args.conv_state = conv.data;
      args.new_conv_state = context.GetOutput(1, conv.shape).GetTensorMutableRawData();
    }
  }

  void run(const Ort::KernelContext& context, const MixerArgs& args) {
#ifdef LHCOMPILE_CUDA
    if (device == Device::cuda) {
      Scratch scratch(context, mixer_scratch(args), device);
      return require_done(mixer_cuda(args, scratch.data(), context.GetGPUComputeStream()));
    }
#endif
    const CpuKernels& kernels = cpu_kernels();
    parallel(context, kernels.mixer_items(args), [&](int64_t i) { kernels.mixer(args, i, i + 1); });
  }

  Device device;
  Constants constants;
  int64_t block, outer;
};

// ---- Linear, and MlpFp8 of two of them --------------------------------------------------------------------------------

// The attributes of projections.
struct Settings {
  explicit Settings(const Ort::ConstKernelInfo& info) {
    auto one_of = [](const char* what, const std::string& name, std::initializer_list<const char*> names) {
      int place = 0;
      for (const char* known : names) {
        if (name == known) return place;
        place++;
      }
      throw Ort::Exception(std::string("lhcompile: unknown ") + what + " " + name, ORT_INVALID_ARGUMENT);
    };
    norm = static_cast<Norm>(one_of("norm", info.GetAttribute<std::string>("norm"), {"none", "layer", "rms"}));
    activation = static_cast<Activation>(
        one_of("activation", info.GetAttribute<std::string>("activation"), {"none", "gelu", "gelu_tanh"}));
    epsilon = info.GetAttribute<float>("epsilon");
  }
  // They and the norm's tables, which are the inputs from `at` on; x has its width by then.
  void apply(const Inputs& inputs, size_t at, LinearArgs& args) const {
    args.norm = norm, args.activation = activation, args.epsilon = epsilon;
    args.norm_scale = inputs.table(at, "norm_scale", {args.width});
    args.norm_bias = inputs.table(at + 1, "norm_bias", {args.width});
    require((norm == Norm::none) == (args.norm_scale == nullptr), "norm_scale and norm go together");
  }
  Norm norm;
  Activation activation;
  float epsilon;
};

int64_t rows_of(const Input& x) {
  int64_t rows = 1;
  for (size_t axis = 0; axis + 1 < x.shape.size(); axis++) rows *= x.shape[axis];
  return rows;
}

// Of x where its last axis has so many outputs; that of the residual too, if there is one.
Shape shape_of(const Input& x, int64_t out, const Input& residual) {
  Shape shape = x.shape;
  shape.back() = out;
  require(!residual || residual.shape == shape,
          [&] { return "residual is " + text(residual.shape) + ", expected " + text(shape); });
  return shape;
}

void project(const Ort::KernelContext& context, const LinearArgs& args, Device device) {
#ifdef LHCOMPILE_CUDA
  if (device == Device::cuda) {
    Scratch scratch(context, linear_scratch(args), device);
    return require_done(linear_cuda(args, scratch.data(), context.GetGPUComputeStream()));
  }
#endif
  const CpuKernels& kernels = cpu_kernels();
  Scratch scratch(context, static_cast<size_t>(kernels.linear_scratch(args)), device);
  parallel(context, args.rows, [&](int64_t i) { kernels.linear_prepare(args, scratch.data(), i, i + 1); });
  parallel(context, kernels.linear_items(args), [&](int64_t i) { kernels.linear(args, scratch.data(), i, i + 1); });
}

constexpr int64_t kBytes = 4;  // the accuracy_level of LinearInt4, as of MatMulNBits, that rounds x to 8 bits

struct LinearKernel {
  LinearKernel(const OrtKernelInfo* given, Device on)
      : device(on), constants(given), settings(Ort::ConstKernelInfo(given)) {
    try {
      accuracy = Ort::ConstKernelInfo(given).GetAttribute<int64_t>("accuracy_level");
    } catch (const Ort::Exception&) {  // of LinearInt4 alone
    }
  }

  void Compute(OrtKernelContext* given) {
    Ort::KernelContext context(given);
    const Inputs inputs(context, constants);
    const Input x = inputs[0], weight = inputs[1];
    require(!x.shape.empty(), "x of Linear is a scalar");
    LinearArgs args{};
    args.width = x.shape.back();
    args.rows = rows_of(x);
    args.signal = x.type, args.weight_type = weight.type;
    args.out = weight.shape.empty() ? 0 : weight.shape[0];
    const bool codes = weight.type == Type::u8;
    const int64_t blocks = args.width / kBlock;
    require(weight.shape == (codes ? Shape{args.out, blocks, kBlock / 2} : Shape{args.out, args.width}) &&
                (!codes || args.width % kBlock == 0),
            [&] { return "weight is " + text(weight.shape) + " for x of width " + std::to_string(args.width); });
    const Input bias = inputs.shaped(2, "bias", {args.out}), residual = inputs[3];
    const Shape shape = shape_of(x, args.out, residual);
    args.bias = bias.data, args.bias_type = bias.type;
    args.residual = residual.data;
    settings.apply(inputs, 4, args);
    if (codes) args.weight_scale = inputs.data(6, "weight_scale", {args.out, blocks});
    if (weight.type == Type::e4m3) args.weight_scale = inputs.data(6, "weight_scale", {args.out});
    args.x = x.data, args.weight = weight.data;
    args.bytes = accuracy == kBytes && codes && x.type == Type::f32;
    args.y = context.GetOutput(0, shape).GetTensorMutableRawData();
    if (args.rows == 0) return;
    project(context, args, device);
  }

  Device device;
  Constants constants;
  Settings settings;
  int64_t accuracy = 0;
};

struct MlpKernel {
  MlpKernel(const OrtKernelInfo* given, Device on)
      : device(on), constants(given), settings(Ort::ConstKernelInfo(given)) {}

  void Compute(OrtKernelContext* given) {
    Ort::KernelContext context(given);
    const Inputs inputs(context, constants);
    const Input x = inputs[0], first = inputs[1], second = inputs[3], residual = inputs[5];
    require(!x.shape.empty() && first.shape.size() == 2 && second.shape.size() == 2,
            "x of MlpFp8 is a scalar, or a weight has not two axes");
    LinearArgs up{}, down{};
    up.rows = down.rows = rows_of(x), up.signal = down.signal = x.type;
    up.width = x.shape.back(), up.out = down.width = first.shape[0], down.out = second.shape[0];
    const Shape shape = shape_of(x, down.out, residual);
    take_weight(inputs, 1, 8, up);
    take_weight(inputs, 3, 9, down);
    settings.apply(inputs, 6, up);
    up.reach = inputs.table(10, "reach", {2});
    up.x = x.data, down.residual = residual.data;
    down.y = context.GetOutput(0, shape).GetTensorMutableRawData();
    if (up.rows == 0) return;
    const size_t codes = static_cast<size_t>(up.rows * up.out + 255) / 256 * 256;
    const Scratch between(context, codes + static_cast<size_t>(up.rows) * sizeof(float), device);
    up.y = between.data(), down.x = between.data();
    up.y_unit = reinterpret_cast<float*>(static_cast<char*>(between.data()) + codes), down.x_unit = up.y_unit;
    project(context, up, device);
    project(context, down, device);
  }

  static void take_weight(const Inputs& inputs, size_t at, size_t scale_at, LinearArgs& args) {
    args.weight = inputs.data(at, "a weight of MlpFp8", {args.out, args.width}), args.weight_type = Type::e4m3;
    args.weight_scale = inputs.data(scale_at, "a scale of MlpFp8", {args.out});
    const Input bias = inputs.shaped(at + 1, "a bias of MlpFp8", {args.out});
    args.bias = bias.data, args.bias_type = bias.type;
  }

  Device device;
  Constants constants;
  Settings settings;
};

// ---- Embedding ------------------------------------------------------------------------------------------------------

struct EmbeddingKernel {
  EmbeddingKernel(const OrtKernelInfo* given, Device on) : device(on), constants(given) {}

  void Compute(OrtKernelContext* given) {
    Ort::KernelContext context(given);
    const Inputs inputs(context, constants);
    const Input table = inputs[0], tokens = inputs[1];
    const bool codes = table.type == Type::u8;
    require(table.shape.size() == (codes ? 3 : 2) && (!codes || table.shape[2] == kBlock / 2),
            [&] { return "the table of an Embedding is " + text(table.shape); });
    EmbeddingArgs args{};
    args.entries = table.shape[0], args.width = table.shape[1] * (codes ? kBlock : 1);
    args.table_type = table.type, args.table = table.data;
    if (codes) args.scale = inputs.data(2, "scale", {args.entries, table.shape[1]});
    args.tokens = static_cast<const int64_t*>(tokens.data);
    Shape shape = tokens.shape;
    shape.push_back(args.width);
    args.x = context.GetOutput(0, shape).GetTensorMutableRawData();
    args.rows = 1;
    for (int64_t size : tokens.shape) args.rows *= size;
    if (args.rows * args.width == 0) return;
#ifdef LHCOMPILE_CUDA
    if (device == Device::cuda) return require_done(embedding_cuda(args, context.GetGPUComputeStream()));
#endif
    for (int64_t row = 0; row < args.rows; row++)
      require(args.tokens[row] >= -args.entries && args.tokens[row] < args.entries, [&] {
        return "token " + std::to_string(args.tokens[row]) + " of a table of " + std::to_string(args.entries);
      });
    const CpuKernels& kernels = cpu_kernels();
    parallel(context, args.rows, [&](int64_t i) { kernels.embedding(args, i, i + 1); });
  }

  Device device;
  Constants constants;
};

// ---- Sample ---------------------------------------------------------------------------------------------------------

struct SampleKernel {
  SampleKernel(const OrtKernelInfo* given, Device on) : device(on), constants(given) {}

  void Compute(OrtKernelContext* given) {
    Ort::KernelContext context(given);
    const Inputs inputs(context, constants);
    const Input logits = inputs[0];
    require(logits.shape.size() == 3 && logits.shape[1] == 1 && logits.shape[2] > 0,
            [&] { return "logits are " + text(logits.shape) + ", expected [batch, 1, vocabulary]"; });
    SampleArgs args{};
    args.batch = logits.shape[0], args.vocab = logits.shape[2];
    args.signal = logits.type, args.logits = logits.data;
    args.uniform = inputs.table(1, "uniform", {args.batch});
    args.temperature = inputs.table(2, "temperature", {args.batch});
    args.top_k = static_cast<const int64_t*>(inputs.data(3, "top_k", {args.batch}));
    args.top_p = inputs.table(4, "top_p", {args.batch});
    args.tokens = static_cast<int64_t*>(context.GetOutput(0, {args.batch, 1}).GetTensorMutableRawData());
    if (args.batch == 0) return;
#ifdef LHCOMPILE_CUDA
    if (device == Device::cuda) return require_done(sample_cuda(args, context.GetGPUComputeStream()));
#endif
    const CpuKernels& kernels = cpu_kernels();
    parallel(context, args.batch, [&](int64_t i) { kernels.sample(args, i, i + 1); });
  }

  Device device;
  Constants constants;
};

// ---- registration ---------------------------------------------------------------------------------------------------

// An operator for one device and one choice of element types.
template <typename Kernel>
struct Operator : Ort::CustomOpBase<Operator<Kernel>, Kernel> {
  Operator(const char* name_, Device device_, std::vector<Type> inputs_, size_t required_, std::vector<Type> outputs_,
           bool variadic_ = false)
      : name(name_),
        device(device_),
        inputs(std::move(inputs_)),
        required(required_),
        outputs(std::move(outputs_)),
        variadic(variadic_) {}

  void* CreateKernel(const OrtApi&, const OrtKernelInfo* info) const { return new Kernel(info, device); }
  const char* GetName() const { return name; }
  const char* GetExecutionProviderType() const {
    return device == Device::cuda ? "CUDAExecutionProvider" : "CPUExecutionProvider";
  }
  size_t GetInputTypeCount() const { return inputs.size(); }
  ONNXTensorElementDataType GetInputType(size_t i) const { return static_cast<ONNXTensorElementDataType>(inputs[i]); }
  size_t GetOutputTypeCount() const { return outputs.size(); }
  ONNXTensorElementDataType GetOutputType(size_t i) const { return static_cast<ONNXTensorElementDataType>(outputs[i]); }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
    if (variadic && i + 1 == inputs.size()) return INPUT_OUTPUT_VARIADIC;
    return (required >> i & 1) ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  }

  const char* name;
  Device device;
  std::vector<Type> inputs;
  size_t required;  // a bit for each input that is always there
  std::vector<Type> outputs;
  bool variadic;  // the last input is any number of them
};

constexpr Type kSignals[] = {Type::f32, Type::f16, Type::bf16};

struct Registry {
  Ort::CustomOpDomain domain{"lhcompile"};
  std::deque<Operator<MixerKernel<false>>> mixers;
  std::deque<Operator<MixerKernel<true>>> steps;
  std::deque<Operator<LinearKernel>> linears;
  std::deque<Operator<EmbeddingKernel>> embeddings;
  std::deque<Operator<SampleKernel>> samples;
  std::deque<Operator<MlpKernel>> mlps;

  Registry() {
    add(Device::cpu);
#ifdef LHCOMPILE_CUDA
    add(Device::cuda);
#endif
    for (auto& each : mlps) domain.Add(&each);
    for (auto& each : mixers) domain.Add(&each);
    for (auto& each : steps) domain.Add(&each);
    for (auto& each : linears) domain.Add(&each);
    for (auto& each : embeddings) domain.Add(&each);
    for (auto& each : samples) domain.Add(&each);
  }

  void add_linears(Device device, Type signal, Type bias) {
    const Type f = Type::f32;
    linears.emplace_back("Linear", device, std::vector<Type>{signal, signal, bias, signal, f, f}, 0b11,
                         std::vector<Type>{signal});
    linears.emplace_back("LinearFp8", device, std::vector<Type>{signal, Type::e4m3, bias, signal, f, f, f}, 0b1000011,
                         std::vector<Type>{signal});
    mlps.emplace_back("MlpFp8", device,
                      std::vector<Type>{signal, Type::e4m3, bias, Type::e4m3, bias, signal, f, f, f, f, f},
                      0b11100001011, std::vector<Type>{signal});
    linears.emplace_back("LinearInt4", device, std::vector<Type>{signal, Type::u8, bias, signal, f, f, Type::f16},
                         0b1000011, std::vector<Type>{signal});
  }

  void add(Device device) {
    const Type f = Type::f32;
    for (Type signal : kSignals) {
      for (Type conv : kSignals)
        for (Type state : kSignals)
          mixers.emplace_back("HyenaMixer", device, std::vector<Type>{signal, conv, state, f, f, f, f, f, f, Type::i32},
                              0b0110101111, std::vector<Type>{signal, conv, state});
      for (Type state : kSignals)
        steps.emplace_back("HyenaStep", device, std::vector<Type>{signal, state, f, f, f, f, f, f, Type::i32, signal},
                           0b0011010111, std::vector<Type>{signal, state}, true);
      add_linears(device, signal, signal);
      if (signal != f) add_linears(device, signal, f);
      embeddings.emplace_back("Embedding", device, std::vector<Type>{signal, Type::i64}, 0b11,
                              std::vector<Type>{signal});
      samples.emplace_back("Sample", device, std::vector<Type>{signal, f, f, Type::i64, f}, 0b11111,
                           std::vector<Type>{Type::i64});
    }
    embeddings.emplace_back("EmbeddingInt4", device, std::vector<Type>{Type::u8, Type::i64, Type::f16}, 0b111,
                            std::vector<Type>{Type::f16});
  }
};

}  // namespace
}  // namespace lhcompile

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(lhcompile::kApi);
  if (!api) return base->GetApi(1)->CreateStatus(ORT_FAIL, "lhcompile: onnxruntime is older than 1.21");
  Ort::InitApi(api);
  try {
    static lhcompile::Registry registry;
    Ort::UnownedSessionOptions(options).Add(registry.domain);
    return nullptr;
  } catch (const std::exception& problem) {
    return api->CreateStatus(ORT_FAIL, problem.what());
  }
}
