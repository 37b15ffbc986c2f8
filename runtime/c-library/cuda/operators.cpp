// Registers the operators of the domain `jinaclip` with ONNX Runtime: for the CUDA provider, or with JINACLIP_HOST for
// the CPU provider. Checks the inputs of each run, which the functions in operators.h take as right.
#include "operators.h"

#include <climits>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "onnxruntime_api.h"

namespace jinaclip {
namespace {

const ort::Api* api = nullptr;

struct InvalidArgument : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void require(bool condition, const char* text) {
  if (!condition) {
    throw InvalidArgument(text);
  }
}

void check(ort::Status* status) {
  if (status != nullptr) {
    const std::string text = ort::GetErrorMessage::call(*api, status);
    ort::ReleaseStatus::call(*api, status);
    throw std::runtime_error(text);
  }
}

// Runs `body` and gives what it throws as a status: no exception may reach ONNX Runtime.
template <typename Body>
ort::Status* guarded(Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const InvalidArgument& error) {
    return ort::CreateStatus::call(*api, ort::kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return ort::CreateStatus::call(*api, ort::kFail, error.what());
  }
}

struct Tensor {
  const void* data = nullptr;
  int type = ort::kAny;
  std::vector<int64_t> shape;

  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
  int64_t last() const { return shape.back(); }
  // The product of all dimensions but the last `but`.
  int64_t rows(size_t but = 1) const {
    int64_t product = 1;
    for (size_t i = 0; i + but < shape.size(); ++i) {
      product *= shape[i];
    }
    return product;
  }
};

// Inputs, outputs and stream of one run.
class Context {
 public:
  explicit Context(ort::KernelContext* context) : context_(context) {}

  std::optional<Tensor> optional_input(size_t index) const {
    size_t count = 0;
    check(ort::GetInputCount::call(*api, context_, &count));
    const ort::Value* value = nullptr;
    if (index < count) {
      check(ort::GetInput::call(*api, context_, index, &value));
    }
    if (value == nullptr) {
      return std::nullopt;
    }
    Tensor tensor;
    ort::TensorInfo* info = nullptr;
    check(ort::GetTensorInfo::call(*api, value, &info));
    size_t dimensions = 0;
    ort::Status* status = ort::GetElementType::call(*api, info, &tensor.type);
    if (status == nullptr) {
      status = ort::GetDimensionCount::call(*api, info, &dimensions);
    }
    if (status == nullptr) {
      tensor.shape.resize(dimensions);
      status = ort::GetDimensions::call(*api, info, tensor.shape.data(), dimensions);
    }
    ort::ReleaseTensorInfo::call(*api, info);
    check(status);
    void* data = nullptr;
    check(ort::GetTensorData::call(*api, const_cast<ort::Value*>(value), &data));
    tensor.data = data;
    return tensor;
  }

  Tensor input(size_t index) const {
    std::optional<Tensor> tensor = optional_input(index);
    require(tensor.has_value(), "a required input is missing");
    return *std::move(tensor);
  }

  template <typename T>
  T* output(size_t index, const std::vector<int64_t>& shape) const {
    ort::Value* value = nullptr;
    check(ort::GetOutput::call(*api, context_, index, shape.data(), shape.size(), &value));
    void* data = nullptr;
    check(ort::GetTensorData::call(*api, value, &data));
    return static_cast<T*>(data);
  }

  Stream stream() const {
    void* stream = nullptr;
    check(ort::GetGpuStream::call(*api, context_, &stream));
    return stream;
  }

 private:
  ort::KernelContext* context_;
};

class Attributes {
 public:
  explicit Attributes(const ort::KernelInfo* info) : info_(info) {}

  float number(const char* name) const {
    float value = 0.0f;
    check(ort::GetFloatAttribute::call(*api, info_, name, &value));
    return value;
  }
  int64_t integer(const char* name) const {
    int64_t value = 0;
    check(ort::GetIntAttribute::call(*api, info_, name, &value));
    return value;
  }
  bool flag(const char* name) const {
    const int64_t value = integer(name);
    require(value == 0 || value == 1, "a flag is neither 0 nor 1");
    return value == 1;
  }

 private:
  const ort::KernelInfo* info_;
};

// A node's kernel: what runs at each call.
using Kernel = std::function<void(const Context&)>;

int width(int64_t columns) {
  require(columns > 0 && columns <= INT_MAX / 8, "the last dimension is 0 or too large");
  return static_cast<int>(columns);
}

void require_rows(int64_t rows) { require(rows <= INT_MAX, "more than 2147483647 rows"); }

void require_matrix_rows(const Tensor& x) { require(!x.shape.empty(), "a scalar where rows are needed"); }

void require_vector(const Tensor& x, int64_t length) {
  require(x.shape.size() == 1 && x.shape[0] == length, "a vector that does not match the last dimension");
}

Kernel make_layer_norm(const Attributes& attributes) {
  const float epsilon = attributes.number("epsilon");
  return [epsilon](const Context& context) {
    const Tensor x = context.input(0), gain = context.input(1), bias = context.input(2);
    require(x.type == ort::kFloat || x.type == ort::kFloat16, "LayerNorm takes float16 or float32");
    require_matrix_rows(x);
    const int columns = width(x.last());
    require_vector(gain, columns);
    require_vector(bias, columns);
    const int64_t rows = x.rows();
    require_rows(rows);
    Half* y = context.output<Half>(0, x.shape);
    if (rows > 0) {
      layer_norm(x.data, x.type == ort::kFloat, gain.as<float>(), bias.as<float>(), y, rows, columns, epsilon,
                 context.stream());
    }
  };
}

Kernel make_add_layer_norm(const Attributes& attributes) {
  const float epsilon = attributes.number("epsilon");
  const bool keep_norm = attributes.flag("keep_norm");
  return [epsilon, keep_norm](const Context& context) {
    const Tensor residual = context.input(0), delta = context.input(1);
    const Tensor gain = context.input(2), bias = context.input(3);
    require_matrix_rows(residual);
    require(residual.shape == delta.shape, "AddLayerNorm: residual and delta have different shapes");
    const int columns = width(residual.last());
    require_vector(gain, columns);
    require_vector(bias, columns);
    const int64_t rows = residual.rows();
    require_rows(rows);
    float* s = context.output<float>(0, residual.shape);
    Half* y = context.output<Half>(1, residual.shape);
    if (rows > 0) {
      add_layer_norm(residual.as<float>(), delta.data, gain.as<float>(), bias.as<float>(), s, y, rows, columns,
                     epsilon, keep_norm, context.stream());
    }
  };
}

Kernel make_add_post_norm(const Attributes& attributes) {
  const float epsilon = attributes.number("epsilon");
  return [epsilon](const Context& context) {
    const Tensor residual = context.input(0), delta = context.input(1);
    const Tensor gain = context.input(2), bias = context.input(3);
    require(residual.type == ort::kFloat || residual.type == ort::kFloat16,
            "AddPostNorm takes a residual of float16 or float32");
    require_matrix_rows(delta);
    const int columns = width(delta.last());
    const bool one_residual = residual.shape == std::vector<int64_t>{columns};
    require(one_residual || residual.shape == delta.shape,
            "AddPostNorm: residual is no vector, and residual and delta have different shapes");
    require_vector(gain, columns);
    require_vector(bias, columns);
    const int64_t rows = delta.rows();
    require_rows(rows);
    Half* y = context.output<Half>(0, delta.shape);
    if (rows > 0) {
      add_post_norm(residual.data, residual.type == ort::kFloat, one_residual, delta.data, gain.as<float>(),
                    bias.as<float>(), y, rows, columns, epsilon, context.stream());
    }
  };
}

Kernel make_split_rotary(const Attributes& attributes) {
  const int64_t num_heads = attributes.integer("num_heads");
  const bool interleaved = attributes.flag("interleaved");
  require(num_heads > 0, "SplitRotary: num_heads is not positive");
  return [num_heads, interleaved](const Context& context) {
    const Tensor qkv = context.input(0), cos = context.input(1), sin = context.input(2);
    require(qkv.shape.size() >= 2, "SplitRotary: qkv has fewer than two dimensions");
    require(qkv.last() % (3 * num_heads * 2) == 0,
            "SplitRotary: qkv's last dimension is not three times num_heads heads of even width");
    const int columns = width(qkv.last()) / 3;
    const int64_t length = qkv.shape[qkv.shape.size() - 2], rows = qkv.rows();
    require_rows(rows);
    require(cos.shape.size() == 2 && cos.shape[1] == columns / num_heads / 2 && cos.shape == sin.shape &&
                cos.shape[0] <= INT_MAX,
            "SplitRotary: cos and sin are not [P, half of a head's width]");
    require(length <= cos.shape[0], "SplitRotary: more positions than rows of cos and sin");
    std::vector<int64_t> shape = qkv.shape;
    shape.back() = columns;
    Half* q = context.output<Half>(0, shape);
    Half* k = context.output<Half>(1, shape);
    Half* v = context.output<Half>(2, shape);
    if (rows > 0) {
      split_rotary(qkv.data, cos.as<float>(), sin.as<float>(), q, k, v, rows, length, columns,
                   static_cast<int>(num_heads), interleaved, context.stream());
    }
  };
}

Kernel make_rotary_attention(const Attributes& attributes) {
  const int64_t num_heads = attributes.integer("num_heads");
  const bool interleaved = attributes.flag("interleaved");
  require(num_heads > 0 && num_heads <= 65535, "RotaryAttention: num_heads is not positive, or more than 65535");
  return [num_heads, interleaved](const Context& context) {
    const Tensor qkv = context.input(0), cos = context.input(1), sin = context.input(2);
    const std::optional<Tensor> positions = context.optional_input(3), offsets = context.optional_input(4);
    const std::optional<Tensor> token_offset = context.optional_input(5);
    require(qkv.shape.size() >= 2, "RotaryAttention: qkv has fewer than two dimensions");
    require(qkv.last() == 3 * num_heads * kHeadColumns,
            "RotaryAttention: qkv's last dimension is not three times num_heads heads of 64 columns");
    const int columns = width(qkv.last()) / 3, heads = static_cast<int>(num_heads);
    const int64_t rows = qkv.rows();
    require_rows(rows);
    require(cos.shape.size() == 2 && cos.shape[0] >= 1 && cos.shape[0] <= INT_MAX &&
                cos.shape[1] == kHeadColumns / 2 && cos.shape == sin.shape,
            "RotaryAttention: cos and sin are not [P, 32]");
    require(offsets.has_value() == token_offset.has_value(),
            "RotaryAttention: of offsets and token_offset one is given without the other");
    int64_t longest = qkv.shape[qkv.shape.size() - 2], texts = longest == 0 ? 0 : rows / longest;
    if (offsets.has_value()) {
      require(offsets->shape.size() == 1 && offsets->shape[0] >= 1 && offsets->shape[0] <= INT_MAX,
              "RotaryAttention: offsets is not a vector of at least one element");
      require(token_offset->shape.size() == 2 && token_offset->shape[0] + 1 == offsets->shape[0],
              "RotaryAttention: token_offset is not [texts, tokens of the longest]");
      texts = token_offset->shape[0];
      longest = token_offset->shape[1];
    }
    if (positions.has_value()) {
      require(positions->rows(0) == rows, "RotaryAttention: positions does not have one element a row");
    } else {
      require(offsets.has_value() || longest <= cos.shape[0],
              "RotaryAttention: more positions than rows of cos and sin");
    }
    const bool any = rows > 0 && texts > 0;
    std::vector<int64_t> shape = qkv.shape;
    shape.back() = columns;
    Half* y = context.output<Half>(0, shape);
    Half* keys = context.output<Half>(1, {any ? rotated_key_rows(rows, longest) : 0, columns});
    if (any) {
      rotary_attention(qkv.data, cos.as<float>(), sin.as<float>(),
                       positions.has_value() ? positions->as<int32_t>() : nullptr,
                       offsets.has_value() ? offsets->as<int32_t>() : nullptr, y, keys, rows, longest,
                       static_cast<int>(texts), static_cast<int>(cos.shape[0]), heads, interleaved, context.stream());
    }
  };
}

Kernel make_swiglu_norm(const Attributes& attributes) {
  const float epsilon = attributes.number("epsilon");
  return [epsilon](const Context& context) {
    const Tensor gate_up = context.input(0), gain = context.input(1), bias = context.input(2);
    require_matrix_rows(gate_up);
    require(gate_up.last() % 2 == 0, "SwigluNorm: gate_up's last dimension is odd");
    const int padded = width(gate_up.last()) / 2;
    require(gain.shape.size() == 1 && gain.shape[0] > 0 && gain.shape[0] <= padded && bias.shape == gain.shape,
            "SwigluNorm: gain and bias are not vectors of at most half of gate_up's last dimension");
    const int64_t rows = gate_up.rows();
    require_rows(rows);
    std::vector<int64_t> shape = gate_up.shape;
    shape.back() = padded;
    Half* y = context.output<Half>(0, shape);
    if (rows > 0) {
      swiglu_norm(gate_up.data, gain.as<float>(), bias.as<float>(), y, rows, static_cast<int>(gain.shape[0]), padded,
                  epsilon, context.stream());
    }
  };
}

Kernel make_gelu(const Attributes&) {
  return [](const Context& context) {
    const Tensor x = context.input(0);
    const int64_t count = x.rows(0);
    require(count / 256 <= INT_MAX, "Gelu: too many elements");
    Half* y = context.output<Half>(0, x.shape);
    if (count > 0) {
      gelu(x.data, y, count, context.stream());
    }
  };
}

Kernel make_linear(const Attributes&) {
  auto product = std::make_shared<Linear>();
  return [product](const Context& context) {
    const Tensor x = context.input(0), weight = context.input(1);
    const std::optional<Tensor> bias = context.optional_input(2);
    require_matrix_rows(x);
    require(weight.shape.size() == 2 && weight.shape[0] == x.last(), "Linear: weight is not [K, N]");
    const int k = width(weight.shape[0]), n = width(weight.shape[1]);
    if (bias.has_value()) {
      require_vector(*bias, n);
    }
    const int64_t rows = x.rows();
    require_rows(rows);
    std::vector<int64_t> shape = x.shape;
    shape.back() = n;
    Half* y = context.output<Half>(0, shape);
    if (rows > 0) {
      product->run(x.data, weight.data, bias.has_value() ? bias->data : nullptr, y, rows, n, k, context.stream());
    }
  };
}

Kernel make_mean_pool(const Attributes&) {
  return [](const Context& context) {
    const Tensor x = context.input(0), offsets = context.input(1);
    require(x.type == ort::kFloat || x.type == ort::kFloat16, "MeanPool takes float16 or float32");
    require(x.shape.size() == 2, "MeanPool: x does not have two dimensions");
    require(offsets.shape.size() == 1 && offsets.shape[0] >= 1 && offsets.shape[0] <= INT_MAX,
            "MeanPool: offsets is not a vector of at least one element");
    const int columns = width(x.last());
    const int64_t texts = offsets.shape[0] - 1;
    float* y = context.output<float>(0, {texts, columns});
    if (texts > 0) {
      mean_pool(x.data, x.type == ort::kFloat, offsets.as<int32_t>(), y, x.shape[0], static_cast<int>(texts), columns,
                context.stream());
    }
  };
}

Kernel make_l2_normalize(const Attributes&) {
  return [](const Context& context) {
    const Tensor x = context.input(0);
    require_matrix_rows(x);
    const int columns = width(x.last());
    const int64_t rows = x.rows();
    require_rows(rows);
    float* y = context.output<float>(0, x.shape);
    if (rows > 0) {
      l2_normalize(x.as<float>(), y, rows, columns, context.stream());
    }
  };
}

struct Input {
  int type;
  bool optional = false;
};

struct Operator : ort::CustomOp {
  const char* op_name;
  std::vector<Input> inputs;
  std::vector<int> outputs;
  Kernel (*make)(const Attributes&);

  Operator(const char* op_name_, std::vector<Input> inputs_, std::vector<int> outputs_,
           Kernel (*make_)(const Attributes&))
      : ort::CustomOp{}, op_name(op_name_), inputs(std::move(inputs_)), outputs(std::move(outputs_)), make(make_) {
    version = ort::kApiVersion;
    name = [](const ort::CustomOp* op) { return self(op).op_name; };
    execution_provider = [](const ort::CustomOp*) -> const char* {
#ifdef JINACLIP_HOST
      return nullptr;
#else
      return "CUDAExecutionProvider";
#endif
    };
    input_type = [](const ort::CustomOp* op, size_t index) { return self(op).inputs[index].type; };
    input_count = [](const ort::CustomOp* op) { return self(op).inputs.size(); };
    output_type = [](const ort::CustomOp* op, size_t index) { return self(op).outputs[index]; };
    output_count = [](const ort::CustomOp* op) { return self(op).outputs.size(); };
    input_characteristic = [](const ort::CustomOp* op, size_t index) {
      return static_cast<int>(self(op).inputs[index].optional ? ort::kOptional : ort::kRequired);
    };
    output_characteristic = [](const ort::CustomOp*, size_t) { return static_cast<int>(ort::kRequired); };
    input_memory_type = [](const ort::CustomOp*, size_t) { return 0; };  // the provider's default: device memory
    start_version = [](const ort::CustomOp*) { return 1; };
    end_version = [](const ort::CustomOp*) { return INT_MAX; };
    create_kernel = [](const ort::CustomOp* op, const ort::Api*, const ort::KernelInfo* info, void** kernel) {
      return guarded([&] { *kernel = new Kernel(self(op).make(Attributes(info))); });
    };
    compute = [](void* kernel, ort::KernelContext* context) {
      return guarded([&] { (*static_cast<Kernel*>(kernel))(Context(context)); });
    };
    destroy_kernel = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }

  static const Operator& self(const ort::CustomOp* op) { return *static_cast<const Operator*>(op); }
};

// Sessions keep pointers to the domain and its operators, so these live as long as the process.
ort::CustomOpDomain* make_domain() {
  using namespace ort;
  static const std::vector<Operator> operators = {
      {"LayerNorm", {{kAny}, {kFloat}, {kFloat}}, {kFloat16}, make_layer_norm},
      {"AddLayerNorm", {{kFloat}, {kFloat16}, {kFloat}, {kFloat}}, {kFloat, kFloat16}, make_add_layer_norm},
      {"AddPostNorm", {{kAny}, {kFloat16}, {kFloat}, {kFloat}}, {kFloat16}, make_add_post_norm},
      {"SplitRotary", {{kFloat16}, {kFloat}, {kFloat}}, {kFloat16, kFloat16, kFloat16}, make_split_rotary},
      {"RotaryAttention",
       {{kFloat16}, {kFloat}, {kFloat}, {kInt32, true}, {kInt32, true}, {kInt32, true}},
       {kFloat16, kFloat16},
       make_rotary_attention},
      {"SwigluNorm", {{kFloat16}, {kFloat}, {kFloat}}, {kFloat16}, make_swiglu_norm},
      {"Gelu", {{kFloat16}}, {kFloat16}, make_gelu},
      {"Linear", {{kFloat16}, {kFloat16}, {kFloat16, true}}, {kFloat16}, make_linear},
      {"MeanPool", {{kAny}, {kInt32}}, {kFloat}, make_mean_pool},
      {"L2Normalize", {{kFloat}}, {kFloat}, make_l2_normalize},
  };
  CustomOpDomain* domain = nullptr;
  jinaclip::check(CreateCustomOpDomain::call(*api, "jinaclip", &domain));
  for (const Operator& op : operators) {
    jinaclip::check(AddToCustomOpDomain::call(*api, domain, static_cast<const CustomOp*>(&op)));
  }
  return domain;
}

}  // namespace
}  // namespace jinaclip

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                                 const ort::ApiBase* base) {
  using namespace jinaclip;
  const ort::Api* table = base->get_api(ort::kApiVersion);
  if (table == nullptr) {
    return nullptr;  // no table, so no way to make a status; a graph that uses the operators will not load
  }
  api = table;
  return guarded([&] {
    static ort::CustomOpDomain* const domain = make_domain();
    jinaclip::check(ort::AddCustomOpDomain::call(*api, options, domain));
  });
}
