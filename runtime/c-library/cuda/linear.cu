// Linear: y [M, N] float16 = x [M, K] weight [K, N] + bias [N] by cublasLt, float32 sums, bias added before rounding.
//
// cublasLt's matrices are column-major, where a row-major [M, N] is an [N, M]: y' [N, M] = weight' [N, K] x' [K, M].
// The bias is then a vector along the rows of y'. The algorithm of a product is timed among cublasLt's proposals at its
// first run outside of a stream capture, and kept for the process; products whose M differs by less than an eighth share
// it.
#include <cublasLt.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "device.h"
#include "operators.h"

namespace jinaclip {
namespace {

constexpr size_t kWorkspaceBytes = size_t{32} << 20;
constexpr int kProposals = 8;
constexpr int kLeastTimedRuns = 2, kMostTimedRuns = 20;
constexpr float kTimedMs = 0.5f;  // of one algorithm, within the limits above
constexpr float kTimingBudgetMs = 25.0f;
constexpr size_t kMostPlans = 4096;

void check_lt(cublasStatus_t status, const char* function) {
  if (status != CUBLAS_STATUS_SUCCESS) {
    throw std::runtime_error(std::string(function) + " failed with cublas status " + std::to_string(status));
  }
}

// Allocation and handle creation are forbidden while any thread captures a stream in CUDA's global mode, unless this
// thread's own mode is relaxed.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// kWorkspaceBytes of the memory of the device that is current at construction.
class Workspace {
 public:
  Workspace() {
    const RelaxedCapture relaxed;
    check(cudaMalloc(&memory_, kWorkspaceBytes));
  }
  ~Workspace() {
    const RelaxedCapture relaxed;
    cudaFree(memory_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* memory() const { return memory_; }

 private:
  void* memory_ = nullptr;
};

// Descriptors, destroyed with their owner.
template <typename Handle, cublasStatus_t (*Destroy)(Handle)>
class Owned {
 public:
  Owned() = default;
  ~Owned() {
    if (handle_ != nullptr) {
      Destroy(handle_);
    }
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  Handle* operator&() { return &handle_; }
  operator Handle() const { return handle_; }

 private:
  Handle handle_ = nullptr;
};
using MatrixLayout = Owned<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;
using ProductDescription = Owned<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>;
using Preference = Owned<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>;

struct Shape {
  int device;
  int64_t m;
  int n, k;
  bool bias;
  uint32_t alignment;  // of all pointers, in bytes, at most 256

  // The shape that it shares an algorithm with.
  Shape rounded() const {
    int64_t step = 1;
    while (step * 16 <= m) {
      step *= 2;
    }
    Shape shape = *this;
    shape.m = (m + step - 1) / step * step;
    return shape;
  }

  bool operator<(const Shape& other) const {
    return std::tie(device, m, n, k, bias, alignment) <
           std::tie(other.device, other.m, other.n, other.k, other.bias, other.alignment);
  }
};

// A product of a shape on given memory: everything but the algorithm.
struct Product {
  cublasLtHandle_t handle;
  MatrixLayout weight_layout, x_layout, y_layout;
  ProductDescription description;
  const void *x, *weight;
  void* y;

  Product(cublasLtHandle_t handle_, const Shape& shape, const void* x_, const void* weight_, const void* bias,
          void* y_)
      : handle(handle_), x(x_), weight(weight_), y(y_) {
    check_lt(cublasLtMatmulDescCreate(&description, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
    if (bias != nullptr) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
      set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, CUDA_R_16F);
      set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
    }
    check_lt(cublasLtMatrixLayoutCreate(&weight_layout, CUDA_R_16F, shape.n, shape.k, shape.n), "weight layout");
    check_lt(cublasLtMatrixLayoutCreate(&x_layout, CUDA_R_16F, shape.k, shape.m, shape.k), "x layout");
    check_lt(cublasLtMatrixLayoutCreate(&y_layout, CUDA_R_16F, shape.n, shape.m, shape.n), "y layout");
  }

  template <typename Value>
  void set(cublasLtMatmulDescAttributes_t attribute, const Value& value) {
    check_lt(cublasLtMatmulDescSetAttribute(description, attribute, &value, sizeof value),
             "cublasLtMatmulDescSetAttribute");
  }

  cublasStatus_t run(const cublasLtMatmulAlgo_t& algorithm, void* workspace, size_t workspace_bytes,
                     cudaStream_t stream) const {
    const float one = 1.0f, zero = 0.0f;
    return cublasLtMatmul(handle, description, &one, weight, weight_layout, x, x_layout, &zero, y, y_layout, y,
                          y_layout, &algorithm, workspace, workspace_bytes, stream);
  }
};

template <typename Value>
void prefer(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute,
            const Value& value) {
  check_lt(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value),
           "cublasLtMatmulPreferenceSetAttribute");
}

// cublasLt's proposals, best guess first. Sums split over blocks are added in float32 only.
std::vector<cublasLtMatmulHeuristicResult_t> proposals(const Product& product, const Shape& shape,
                                                       size_t workspace_bytes) {
  Preference preference;
  check_lt(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
  prefer(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(workspace_bytes));
  prefer(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
         static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  for (const auto attribute :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    prefer(preference, attribute, shape.alignment);
  }
  std::vector<cublasLtMatmulHeuristicResult_t> found(kProposals);
  int count = 0;
  check_lt(cublasLtMatmulAlgoGetHeuristic(product.handle, product.description, product.weight_layout,
                                          product.x_layout, product.y_layout, product.y_layout, preference, kProposals,
                                          found.data(), &count),
           "cublasLtMatmulAlgoGetHeuristic");
  found.resize(count);
  found.erase(std::remove_if(found.begin(), found.end(),
                             [](const auto& result) { return result.state != CUBLAS_STATUS_SUCCESS; }),
              found.end());
  if (found.empty()) {
    throw std::runtime_error("cublasLt has no algorithm for this product");
  }
  return found;
}

class Event {
 public:
  Event() { check(cudaEventCreate(&event_)); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  operator cudaEvent_t() const { return event_; }

 private:
  cudaEvent_t event_;
};

// Runs captured on a stream of its own, to be replayed without the host's time between them.
class CapturedRuns {
 public:
  CapturedRuns(const Product& product, const cublasLtMatmulAlgo_t& algorithm, void* workspace, int runs) {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    bool good = true;
    for (int run = 0; run < runs; ++run) {
      good = good && product.run(algorithm, workspace, kWorkspaceBytes, stream_) == CUBLAS_STATUS_SUCCESS;
    }
    good = cudaStreamEndCapture(stream_, &graph_) == cudaSuccess && good;
    good = good && cudaGraphInstantiate(&executable_, graph_, 0) == cudaSuccess;
    if (!good) {
      cudaGetLastError();  // this algorithm is left out, and the next call that asks is not to find its error
    }
  }
  ~CapturedRuns() {
    if (executable_ != nullptr) {
      cudaGraphExecDestroy(executable_);
    }
    if (graph_ != nullptr) {
      cudaGraphDestroy(graph_);
    }
    if (stream_ != nullptr) {
      cudaStreamDestroy(stream_);
    }
  }
  CapturedRuns(const CapturedRuns&) = delete;
  CapturedRuns& operator=(const CapturedRuns&) = delete;
  bool ready() const { return executable_ != nullptr; }
  void replay(cudaStream_t stream) const { check(cudaGraphLaunch(executable_, stream)); }

 private:
  cudaStream_t stream_ = nullptr;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

// Device time in milliseconds of what `work` queues on the stream.
template <typename Work>
float timed(cudaStream_t stream, Work work) {
  const Event begin, end;
  check(cudaEventRecord(begin, stream));
  work();
  check(cudaEventRecord(end, stream));
  check(cudaEventSynchronize(end));
  float milliseconds = 0.0f;
  check(cudaEventElapsedTime(&milliseconds, begin, end));
  return milliseconds;
}

// The fastest proposal; each run writes the product to its output.
cublasLtMatmulAlgo_t fastest(const Product& product, const Shape& shape, void* workspace, cudaStream_t stream) {
  const RelaxedCapture relaxed;
  const auto candidates = proposals(product, shape, kWorkspaceBytes);
  const cublasLtMatmulAlgo_t* best = nullptr;
  float best_time = 0.0f, spent = 0.0f;
  for (const auto& candidate : candidates) {
    if (best != nullptr && spent > kTimingBudgetMs) {
      break;
    }
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    const auto once = [&] { status = product.run(candidate.algo, workspace, kWorkspaceBytes, stream); };
    spent += timed(stream, once);  // loads the kernel
    if (status != CUBLAS_STATUS_SUCCESS) {
      continue;
    }
    const float estimate = timed(stream, once);
    const int runs = std::clamp(static_cast<int>(kTimedMs / (estimate + 1e-4f)), kLeastTimedRuns, kMostTimedRuns);
    const CapturedRuns captured(product, candidate.algo, workspace, runs);
    if (!captured.ready()) {
      continue;
    }
    const float time = timed(stream, [&] { captured.replay(stream); });
    spent += estimate + time;
    if (best == nullptr || time / static_cast<float>(runs) < best_time) {
      best = &candidate.algo;
      best_time = time / static_cast<float>(runs);
    }
  }
  if (best == nullptr) {
    throw std::runtime_error("none of cublasLt's algorithms for this product runs");
  }
  return *best;
}

// What the products of a process share.
class Library {
 public:
  static Library& instance() {
    static Library* library = new Library;  // outlives the destructors of other libraries
    return *library;
  }

  cublasLtHandle_t handle(int device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    cublasLtHandle_t& handle = handles_[device];
    if (handle == nullptr) {
      const RelaxedCapture relaxed;
      check_lt(cublasLtCreate(&handle), "cublasLtCreate");
    }
    return handle;
  }

  // The workspace of a stream, shared by its products and freed with the last of them. Null, if there is none and
  // `allocate` is false.
  std::shared_ptr<Workspace> workspace(int device, cudaStream_t stream, bool allocate) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto entry = workspaces_.begin(); entry != workspaces_.end();) {
      entry = entry->second.expired() ? workspaces_.erase(entry) : std::next(entry);
    }
    std::weak_ptr<Workspace>& known = workspaces_[{device, stream}];
    std::shared_ptr<Workspace> workspace = known.lock();
    if (workspace == nullptr && allocate) {
      workspace = std::make_shared<Workspace>();
      known = workspace;
    }
    return workspace;
  }

  // The algorithm of a shape and of those near it. One thread at a time measures.
  cublasLtMatmulAlgo_t algorithm(const Product& product, const Shape& shape, void* workspace, cudaStream_t stream,
                                 bool may_measure) {
    const std::lock_guard<std::mutex> lock(plans_mutex_);
    const Shape key = shape.rounded();
    const auto known = plans_.find(key);
    if (known != plans_.end()) {
      return known->second;
    }
    if (!may_measure) {
      return proposals(product, shape, kWorkspaceBytes).front().algo;
    }
    const cublasLtMatmulAlgo_t algorithm = fastest(product, shape, workspace, stream);
    if (plans_.size() >= kMostPlans) {
      plans_.clear();
    }
    plans_.emplace(key, algorithm);
    return algorithm;
  }

 private:
  std::mutex mutex_, plans_mutex_;
  std::map<int, cublasLtHandle_t> handles_;
  std::map<std::pair<int, cudaStream_t>, std::weak_ptr<Workspace>> workspaces_;
  std::map<Shape, cublasLtMatmulAlgo_t> plans_;
};

uint32_t common_alignment(std::initializer_list<const void*> pointers) {
  uintptr_t bits = 256;
  for (const void* pointer : pointers) {
    bits |= reinterpret_cast<uintptr_t>(pointer);
  }
  return static_cast<uint32_t>(bits & (~bits + 1));
}

}  // namespace

struct Linear::State {
  std::mutex mutex;
  std::map<std::pair<int, cudaStream_t>, std::shared_ptr<Workspace>> workspaces;
};

Linear::Linear() : state_(std::make_unique<State>()) {}
Linear::~Linear() = default;

void Linear::run(const Half* x, const Half* weight, const Half* bias, Half* y, int64_t m, int n, int k,
                 Stream stream_pointer) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  int device = 0;
  check(cudaGetDevice(&device));
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &capture));
  const bool captured = capture != cudaStreamCaptureStatusNone;
  Library& library = Library::instance();
  const Shape shape{device, m, n, k, bias != nullptr, common_alignment({x, weight, bias, y})};
  const Product product(library.handle(device), shape, x, weight, bias, y);

  std::shared_ptr<Workspace> workspace;
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    std::shared_ptr<Workspace>& known = state_->workspaces[{device, stream}];
    if (known == nullptr) {
      known = library.workspace(device, stream, !captured);
    }
    workspace = known;
  }
  if (workspace == nullptr) {
    check_lt(product.run(proposals(product, shape, 0).front().algo, nullptr, 0, stream), "cublasLtMatmul");
    return;
  }
  const cublasLtMatmulAlgo_t algorithm = library.algorithm(product, shape, workspace->memory(), stream, !captured);
  cublasStatus_t status = product.run(algorithm, workspace->memory(), kWorkspaceBytes, stream);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE) {
    // It was timed with another M.
    const cublasLtMatmulAlgo_t own = proposals(product, shape, kWorkspaceBytes).front().algo;
    status = product.run(own, workspace->memory(), kWorkspaceBytes, stream);
  }
  check_lt(status, "cublasLtMatmul");
}

}  // namespace jinaclip
