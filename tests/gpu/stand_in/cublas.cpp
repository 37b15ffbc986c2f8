// libcublas.so.13: products of matrices. Nothing is multiplied; shapes, types and memory are checked and journaled.
//
// A handle takes a workspace of 32 MiB from the device, as cuBLAS does on capability 9.0: one made while a stream
// captures fails, and one per thread shows in the memory used.

#include <cstdint>

#include "work.h"

namespace {

enum Status {
    SUCCESS = 0,
    NOT_INITIALIZED = 1,
    ALLOC_FAILED = 3,
    INVALID_VALUE = 7,
    EXECUTION_FAILED = 13,
    NOT_SUPPORTED = 15
};

constexpr size_t WORKSPACE = 32u << 20;

struct Handle {
    cudaStream_t stream = nullptr;
    int math_mode = 0;
    void* workspace = nullptr;
};

struct Matrix {
    const void* pointer;
    int type, leading;
    long long stride;
};

std::string compute(const Handle* handle, int type) {
    const std::string name = stand_in::compute_name(type);
    return handle->math_mode == 3 && name == "float32" ? name + " by tf32" : name;  // CUBLAS_TF32_TENSOR_OP_MATH
}

// C[m, n] = op(A)[m, k] · op(B)[k, n], column by column, `batch` times.
int product(
    void* opaque, int op_a, int op_b, int m, int n, int k, Matrix a, Matrix b, Matrix c, int batch, int compute_type
) {
    const auto* handle = static_cast<Handle*>(opaque);
    if (!handle) return NOT_INITIALIZED;
    const int a_rows = op_a ? k : m, a_columns = op_a ? m : k, b_rows = op_b ? n : k, b_columns = op_b ? k : n;
    if (m < 0 || n < 0 || k < 0 || a.leading < std::max(1, a_rows) || b.leading < std::max(1, b_rows) ||
        c.leading < std::max(1, m))
        return INVALID_VALUE;
    stand_in::Product one{
        "cublas",
        {"NTC"[op_a], "NTC"[op_b]},
        stand_in::type_name(a.type),
        stand_in::type_name(b.type),
        stand_in::type_name(c.type),
        compute(handle, compute_type),
        "",
        m,
        n,
        k,
        batch,
        {{"A", a.pointer, stand_in::matrix_bytes(a_rows, a_columns, a.leading, a.type, batch, a.stride)},
         {"B", b.pointer, stand_in::matrix_bytes(b_rows, b_columns, b.leading, b.type, batch, b.stride)},
         {"C", c.pointer, stand_in::matrix_bytes(m, n, c.leading, c.type, batch, c.stride)}}
    };
    return stand_in::enqueue(handle->stream, one) == cudaSuccess ? SUCCESS : EXECUTION_FAILED;
}

// The pointers of a batch lie on the device, in memory that a kernel fills: they are not looked at.
int product_of_pointers(
    void* opaque, int op_a, int op_b, int m, int n, int k, int a, int b, int c, int batch, int compute_type
) {
    const auto* handle = static_cast<Handle*>(opaque);
    if (!handle) return NOT_INITIALIZED;
    stand_in::Product one{
        "cublas",
        {"NTC"[op_a], "NTC"[op_b]},
        stand_in::type_name(a),
        stand_in::type_name(b),
        stand_in::type_name(c),
        compute(handle, compute_type),
        "",
        m,
        n,
        k,
        batch,
        {}
    };
    return stand_in::enqueue(handle->stream, one) == cudaSuccess ? SUCCESS : EXECUTION_FAILED;
}

// C[m, n] = alpha · op(A) + beta · op(B), which ONNX Runtime transposes with: A and B are one matrix then.
int sum(void* opaque, int op_a, int op_b, int m, int n, Matrix a, Matrix b, Matrix c) {
    const auto* handle = static_cast<Handle*>(opaque);
    if (!handle) return NOT_INITIALIZED;
    const auto bytes = [m, n](const Matrix& of, int transposed) {
        return stand_in::matrix_bytes(transposed ? n : m, transposed ? m : n, of.leading, of.type, 1, 0);
    };
    const std::string type = stand_in::type_name(c.type);
    stand_in::Product one{
        "cublas geam",
        {"NTC"[op_a], "NTC"[op_b]},
        type,
        type,
        type,
        type,
        "",
        m,
        n,
        1,
        1,
        {{"A", a.pointer, bytes(a, op_a)},
         {"B", b.pointer, b.pointer ? bytes(b, op_b) : 0},
         {"C", c.pointer, bytes(c, 0)}}
    };
    return stand_in::enqueue(handle->stream, one) == cudaSuccess ? SUCCESS : EXECUTION_FAILED;
}

constexpr int FLOAT = CUDA_R_32F, DOUBLE = CUDA_R_64F, IN_FLOAT = 68, IN_DOUBLE = 70;

}  // namespace

extern "C" {

int cublasCreate_v2(void** made) {
    auto* handle = new Handle;
    *made = handle;
    if (cudaMalloc(&handle->workspace, WORKSPACE) == cudaSuccess) return SUCCESS;
    delete handle;
    *made = nullptr;
    return ALLOC_FAILED;
}
int cublasDestroy_v2(void* opaque) {
    auto* handle = static_cast<Handle*>(opaque);
    if (!handle) return NOT_INITIALIZED;
    const cudaError_t error = cudaFree(handle->workspace);
    delete handle;
    return error == cudaSuccess ? SUCCESS : EXECUTION_FAILED;
}
int cublasSetStream_v2(void* handle, cudaStream_t stream) {
    static_cast<Handle*>(handle)->stream = stream;
    return SUCCESS;
}
int cublasGetStream_v2(void* handle, cudaStream_t* stream) {
    *stream = static_cast<Handle*>(handle)->stream;
    return SUCCESS;
}
int cublasSetWorkspace_v2(void*, void*, size_t) { return SUCCESS; }
int cublasSetMathMode(void* handle, int mode) {
    static_cast<Handle*>(handle)->math_mode = mode;
    return SUCCESS;
}
int cublasGetMathMode(void* handle, int* mode) {
    *mode = static_cast<Handle*>(handle)->math_mode;
    return SUCCESS;
}
int cublasSetPointerMode_v2(void*, int) { return SUCCESS; }
int cublasGetPointerMode_v2(void*, int* mode) {
    *mode = 0;
    return SUCCESS;
}
int cublasGetVersion_v2(void*, int* version) {
    *version = 130000;
    return SUCCESS;
}
const char* cublasGetStatusName(int status) {
    switch (status) {
        case SUCCESS:
            return "CUBLAS_STATUS_SUCCESS";
        case NOT_INITIALIZED:
            return "CUBLAS_STATUS_NOT_INITIALIZED";
        case ALLOC_FAILED:
            return "CUBLAS_STATUS_ALLOC_FAILED";
        case INVALID_VALUE:
            return "CUBLAS_STATUS_INVALID_VALUE";
        case EXECUTION_FAILED:
            return "CUBLAS_STATUS_EXECUTION_FAILED";
        default:
            return "CUBLAS_STATUS_NOT_SUPPORTED";
    }
}
const char* cublasGetStatusString(int status) { return cublasGetStatusName(status); }

int cublasGemmEx(
    void* handle, int op_a, int op_b, int m, int n, int k, const void*, const void* a, int a_type, int lda,
    const void* b, int b_type, int ldb, const void*, void* c, int c_type, int ldc, int compute_type, int
) {
    return product(
        handle, op_a, op_b, m, n, k, {a, a_type, lda, 0}, {b, b_type, ldb, 0}, {c, c_type, ldc, 0}, 1, compute_type
    );
}
int cublasGemmStridedBatchedEx(
    void* handle, int op_a, int op_b, int m, int n, int k, const void*, const void* a, int a_type, int lda,
    long long a_stride, const void* b, int b_type, int ldb, long long b_stride, const void*, void* c, int c_type,
    int ldc, long long c_stride, int batch, int compute_type, int
) {
    return product(
        handle, op_a, op_b, m, n, k, {a, a_type, lda, a_stride}, {b, b_type, ldb, b_stride}, {c, c_type, ldc, c_stride},
        batch, compute_type
    );
}
int cublasGemmBatchedEx(
    void* handle, int op_a, int op_b, int m, int n, int k, const void*, const void* const*, int a_type, int,
    const void* const*, int b_type, int, const void*, void* const*, int c_type, int, int batch, int compute_type, int
) {
    return product_of_pointers(handle, op_a, op_b, m, n, k, a_type, b_type, c_type, batch, compute_type);
}
int cublasSgemm_v2(
    void* handle, int op_a, int op_b, int m, int n, int k, const float*, const float* a, int lda, const float* b,
    int ldb, const float*, float* c, int ldc
) {
    return product(
        handle, op_a, op_b, m, n, k, {a, FLOAT, lda, 0}, {b, FLOAT, ldb, 0}, {c, FLOAT, ldc, 0}, 1, IN_FLOAT
    );
}
int cublasSgemmStridedBatched(
    void* handle, int op_a, int op_b, int m, int n, int k, const float*, const float* a, int lda, long long a_stride,
    const float* b, int ldb, long long b_stride, const float*, float* c, int ldc, long long c_stride, int batch
) {
    return product(
        handle, op_a, op_b, m, n, k, {a, FLOAT, lda, a_stride}, {b, FLOAT, ldb, b_stride}, {c, FLOAT, ldc, c_stride},
        batch, IN_FLOAT
    );
}
int cublasSgemmBatched(
    void* handle, int op_a, int op_b, int m, int n, int k, const float*, const float* const*, int, const float* const*,
    int, const float*, float* const*, int, int batch
) {
    return product_of_pointers(handle, op_a, op_b, m, n, k, FLOAT, FLOAT, FLOAT, batch, IN_FLOAT);
}
int cublasDgemm_v2(
    void* handle, int op_a, int op_b, int m, int n, int k, const double*, const double* a, int lda, const double* b,
    int ldb, const double*, double* c, int ldc
) {
    return product(
        handle, op_a, op_b, m, n, k, {a, DOUBLE, lda, 0}, {b, DOUBLE, ldb, 0}, {c, DOUBLE, ldc, 0}, 1, IN_DOUBLE
    );
}

int cublasSgeam(
    void* handle, int op_a, int op_b, int m, int n, const float*, const float* a, int lda, const float*, const float* b,
    int ldb, float* c, int ldc
) {
    return sum(handle, op_a, op_b, m, n, {a, FLOAT, lda, 0}, {b, FLOAT, ldb, 0}, {c, FLOAT, ldc, 0});
}
int cublasDgeam(
    void* handle, int op_a, int op_b, int m, int n, const double*, const double* a, int lda, const double*,
    const double* b, int ldb, double* c, int ldc
) {
    return sum(handle, op_a, op_b, m, n, {a, DOUBLE, lda, 0}, {b, DOUBLE, ldb, 0}, {c, DOUBLE, ldc, 0});
}

// Of these no graph of this project makes use. A call is refused, so that one that comes is noticed.
#define NOT_PLAYED(name) \
    int name() { return NOT_SUPPORTED; }
NOT_PLAYED(cublasDgemmBatched)
NOT_PLAYED(cublasDgemmStridedBatched)
NOT_PLAYED(cublasDgetrfBatched)
NOT_PLAYED(cublasDgetriBatched)
NOT_PLAYED(cublasScopy_v2)
NOT_PLAYED(cublasSgetrfBatched)
NOT_PLAYED(cublasSgetriBatched)
NOT_PLAYED(cublasSscal_v2)

}  // extern "C"
