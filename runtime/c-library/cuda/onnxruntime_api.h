// The part of ONNX Runtime's C interface that a custom-operator library needs. No package ships the header of that
// interface, so the functions used are declared here by their place in the table OrtApi, which only ever grows.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

// Opaque types of ONNX Runtime.
struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorInfo;

// The version of the table that is asked for; every later release of ONNX Runtime has it too.
constexpr uint32_t kApiVersion = 17;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };

// ONNXTensorElementDataType; kAny matches every type of an input.
enum ElementType : int { kAny = 0, kFloat = 1, kInt32 = 6, kFloat16 = 10 };

enum Characteristic : int { kRequired = 0, kOptional = 1 };

// OrtApi as an array of function pointers. `Function<slot, signature>` names one of them.
struct Api {
  void* slots[273];
};

template <size_t Slot, typename Signature>
struct Function;

template <size_t Slot, typename Result, typename... Arguments>
struct Function<Slot, Result(Arguments...)> {
  static Result call(const Api& api, Arguments... arguments) {
    return reinterpret_cast<Result (*)(Arguments...)>(api.slots[Slot])(arguments...);
  }
};

using CreateStatus = Function<0, Status*(ErrorCode, const char*)>;
using GetErrorMessage = Function<2, const char*(const Status*)>;
using CreateCustomOpDomain = Function<26, Status*(const char*, CustomOpDomain**)>;
using AddToCustomOpDomain = Function<27, Status*(CustomOpDomain*, const void*)>;
using AddCustomOpDomain = Function<28, Status*(SessionOptions*, CustomOpDomain*)>;
using GetTensorData = Function<51, Status*(Value*, void**)>;
using GetElementType = Function<60, Status*(const TensorInfo*, int*)>;
using GetDimensionCount = Function<61, Status*(const TensorInfo*, size_t*)>;
using GetDimensions = Function<62, Status*(const TensorInfo*, int64_t*, size_t)>;
using GetTensorInfo = Function<65, Status*(const Value*, TensorInfo**)>;
using GetFloatAttribute = Function<85, Status*(const KernelInfo*, const char*, float*)>;
using GetIntAttribute = Function<86, Status*(const KernelInfo*, const char*, int64_t*)>;
using GetInputCount = Function<88, Status*(const KernelContext*, size_t*)>;
using GetInput = Function<90, Status*(const KernelContext*, size_t, const Value**)>;
using GetOutput = Function<91, Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)>;
using ReleaseStatus = Function<93, void(Status*)>;
using ReleaseTensorInfo = Function<99, void(TensorInfo*)>;
using GetGpuStream = Function<193, Status*(const KernelContext*, void**)>;

struct ApiBase {
  const Api* (*get_api)(uint32_t version);
  const char* (*get_version_string)();
};

// OrtCustomOp of version 17: callbacks in a fixed order. ONNX Runtime does not call those that are null here.
struct CustomOp {
  uint32_t version;
  void* create_kernel_v1;
  const char* (*name)(const CustomOp*);
  const char* (*execution_provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void* compute_v1;
  void (*destroy_kernel)(void*);
  int (*input_characteristic)(const CustomOp*, size_t);
  int (*output_characteristic)(const CustomOp*, size_t);
  int (*input_memory_type)(const CustomOp*, size_t);
  void* variadic[4];
  Status* (*create_kernel)(const CustomOp*, const Api*, const KernelInfo*, void**);
  Status* (*compute)(void*, KernelContext*);
  void* infer_output_shape;
  int (*start_version)(const CustomOp*);
  int (*end_version)(const CustomOp*);
};

}  // namespace ort
