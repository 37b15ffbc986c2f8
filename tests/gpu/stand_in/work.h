// What the product libraries ask of the runtime: to journal a product, check its memory, and add it to a capture.
#pragma once

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "cuda_runtime_api.h"
#include "library_types.h"

namespace stand_in {

// Memory that a piece of work reads or writes: it must lie within one live allocation of the device.
struct Operand {
    std::string name;
    const void* pointer;
    size_t bytes;
};

struct Product {
    std::string library, transposes, a, b, c, compute, epilogue;
    long long m, n, k, batch;
    std::vector<Operand> operands;
};

// Put a product on a stream. An error where an operand is not in live memory, or the stream's capture is invalid.
__attribute__((visibility("default"))) cudaError_t enqueue(cudaStream_t stream, const Product& product);

inline std::string type_name(int type) {
    switch (type) {
        case CUDA_R_32F:
            return "float32";
        case CUDA_R_64F:
            return "float64";
        case CUDA_R_16F:
            return "float16";
        case CUDA_R_16BF:
            return "bfloat16";
        case CUDA_R_8I:
            return "int8";
        case CUDA_R_32I:
            return "int32";
        case CUDA_R_8F_E4M3:
            return "float8e4m3";
        case CUDA_R_8F_E5M2:
            return "float8e5m2";
        default:
            return "type " + std::to_string(type);
    }
}

inline size_t type_bytes(int type) {
    switch (type) {
        case CUDA_R_64F:
            return 8;
        case CUDA_R_32F:
        case CUDA_R_32I:
            return 4;
        case CUDA_R_16F:
        case CUDA_R_16BF:
            return 2;
        default:
            return 1;
    }
}

// cublasComputeType_t, whose header belongs to a package that is not needed otherwise.
inline std::string compute_name(int compute) {
    switch (compute) {
        case 64:
        case 65:
            return "float16";
        case 68:
        case 69:
            return "float32";
        case 70:
        case 71:
            return "float64";
        case 72:
        case 73:
            return "int32";
        case 74:
            return "float32 by float16";
        case 75:
            return "float32 by bfloat16";
        case 77:
            return "float32 by tf32";
        default:
            return "compute " + std::to_string(compute);
    }
}

// Bytes from the first element of a column-major matrix to the end of its last.
inline size_t matrix_bytes(
    long long rows, long long columns, long long leading, int type, long long batch, long long stride
) {
    if (rows <= 0 || columns <= 0 || batch <= 0) return 0;
    return static_cast<size_t>((batch - 1) * stride + (columns - 1) * leading + rows) * type_bytes(type);
}

}  // namespace stand_in
