// libcublasLt.so.13: products with descriptions, heuristics and epilogues. Nothing is multiplied; shapes, types, the
// epilogue and all memory are checked and journaled.
//
// The descriptions' layouts are cublasLt's own business, so each holds this library's struct, within the sizes that
// cublasLt's header gives to those that a caller makes on its stack.

#include <cstdint>
#include <cstring>

#include "work.h"

namespace {

enum Status { SUCCESS = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };

// cublasLtMatrixLayoutAttribute_t.
struct Layout {
    int32_t type, order, batch;
    uint64_t rows, columns;
    int64_t leading, stride;
};
static_assert(sizeof(Layout) <= 8 * sizeof(uint64_t));

// cublasLtMatmulDescAttributes_t.
enum {
    COMPUTE_TYPE = 0,
    SCALE_TYPE = 1,
    TRANSPOSE_A = 3,
    TRANSPOSE_B = 4,
    EPILOGUE = 7,
    BIAS_POINTER = 8,
    BIAS_TYPE = 26
};
struct Operation {
    int32_t compute, scale_type, transpose_a, transpose_b, epilogue, bias_type;
    const void* bias;
};
static_assert(sizeof(Operation) <= 23 * sizeof(uint64_t));

// cublasLtMatmulPreferenceAttributes_t.
enum { MOST_WORKSPACE = 1 };
struct Preference {
    uint64_t workspace;
};

// cublasLtMatmulHeuristicResult_t.
struct Heuristic {
    uint64_t algorithm[8];
    size_t workspace;
    int32_t status;
    float waves;
    int32_t reserved[4];
};
constexpr size_t ALGORITHM_WORKSPACE = 4u << 20;
constexpr uint64_t ALGORITHM = 0x5afe;  // marks an algorithm as one that the heuristic gave

enum { EPILOGUE_RELU = 2, EPILOGUE_BIAS = 4, EPILOGUE_GELU = 32, EPILOGUE_AUX = 128 };

std::string epilogue_name(int epilogue) {
    if (epilogue <= 1) return "";
    std::string name;
    if (epilogue & EPILOGUE_RELU) name += "relu ";
    if (epilogue & EPILOGUE_GELU) name += "gelu ";
    if (epilogue & EPILOGUE_BIAS) name += "bias ";
    if (epilogue & EPILOGUE_AUX) name += "aux ";
    return name.empty() ? "epilogue " + std::to_string(epilogue) : name.substr(0, name.size() - 1);
}

template <class T>
int take(T& field, const void* value, size_t bytes) {
    if (bytes < sizeof field) return INVALID_VALUE;
    std::memcpy(&field, value, sizeof field);
    return SUCCESS;
}

int set_in(Layout& of, int attribute, const void* value, size_t bytes) {
    switch (attribute) {
        case 0:
            return take(of.type, value, bytes);
        case 1:
            return take(of.order, value, bytes);
        case 2:
            return take(of.rows, value, bytes);
        case 3:
            return take(of.columns, value, bytes);
        case 4:
            return take(of.leading, value, bytes);
        case 5:
            return take(of.batch, value, bytes);
        case 6:
            return take(of.stride, value, bytes);
        default:
            return SUCCESS;
    }
}

int set_in(Operation& of, int attribute, const void* value, size_t bytes) {
    switch (attribute) {
        case COMPUTE_TYPE:
            return take(of.compute, value, bytes);
        case SCALE_TYPE:
            return take(of.scale_type, value, bytes);
        case TRANSPOSE_A:
            return take(of.transpose_a, value, bytes);
        case TRANSPOSE_B:
            return take(of.transpose_b, value, bytes);
        case EPILOGUE:
            return take(of.epilogue, value, bytes);
        case BIAS_POINTER:
            return take(of.bias, value, bytes);
        case BIAS_TYPE:
            return take(of.bias_type, value, bytes);
        default:
            return SUCCESS;
    }
}

size_t bytes_of(const Layout& of) {
    const bool by_rows = of.order == 1;  // CUBLASLT_ORDER_ROW
    const auto rows = static_cast<long long>(by_rows ? of.columns : of.rows),
               columns = static_cast<long long>(by_rows ? of.rows : of.columns);
    return stand_in::matrix_bytes(rows, columns, of.leading, of.type, of.batch, of.stride);
}

// Whether D[m, n] = op(A)[m, k] · op(B)[k, n] holds in its shapes.
bool fits(const Operation& how, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
    const uint64_t m = how.transpose_a ? a.columns : a.rows, k = how.transpose_a ? a.rows : a.columns;
    const uint64_t n = how.transpose_b ? b.rows : b.columns, inner = how.transpose_b ? b.columns : b.rows;
    for (const Layout* one : {&a, &b, &c, &d})
        if (one->leading < static_cast<int64_t>(one->order == 1 ? one->columns : one->rows) || one->batch != a.batch)
            return false;
    return inner == k && d.rows == m && d.columns == n && c.rows == m && c.columns == n;
}

}  // namespace

extern "C" {

int cublasLtCreate(void** handle) {
    static int made;
    *handle = &made;
    return SUCCESS;
}
int cublasLtDestroy(void*) { return SUCCESS; }
size_t cublasLtGetVersion() { return 130000; }
size_t cublasLtGetCudartVersion() { return 13000; }
const char* cublasLtGetStatusName(int status) {
    return status == SUCCESS ? "CUBLAS_STATUS_SUCCESS" : "CUBLAS_STATUS_ERROR";
}
const char* cublasLtGetStatusString(int status) { return cublasLtGetStatusName(status); }

int cublasLtMatrixLayoutInit_internal(
    void* layout, size_t bytes, int type, uint64_t rows, uint64_t columns, int64_t leading
) {
    if (bytes < sizeof(Layout)) return INVALID_VALUE;
    const Layout made{type, 0, 1, rows, columns, leading, 0};
    std::memcpy(layout, &made, sizeof made);
    return SUCCESS;
}
int cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    *layout = new Layout{type, 0, 1, rows, columns, leading, 0};
    return SUCCESS;
}
int cublasLtMatrixLayoutDestroy(void* layout) {
    delete static_cast<Layout*>(layout);
    return SUCCESS;
}
int cublasLtMatrixLayoutSetAttribute(void* layout, int attribute, const void* value, size_t bytes) {
    return set_in(*static_cast<Layout*>(layout), attribute, value, bytes);
}

int cublasLtMatmulDescInit_internal(void* operation, size_t bytes, int compute, int scale_type) {
    if (bytes < sizeof(Operation)) return INVALID_VALUE;
    const Operation made{compute, scale_type, 0, 0, 1, -1, nullptr};
    std::memcpy(operation, &made, sizeof made);
    return SUCCESS;
}
int cublasLtMatmulDescCreate(void** operation, int compute, int scale_type) {
    *operation = new Operation{compute, scale_type, 0, 0, 1, -1, nullptr};
    return SUCCESS;
}
int cublasLtMatmulDescDestroy(void* operation) {
    delete static_cast<Operation*>(operation);
    return SUCCESS;
}
int cublasLtMatmulDescSetAttribute(void* operation, int attribute, const void* value, size_t bytes) {
    return set_in(*static_cast<Operation*>(operation), attribute, value, bytes);
}

int cublasLtMatmulPreferenceInit_internal(void* preference, size_t bytes) {
    if (bytes < sizeof(Preference)) return INVALID_VALUE;
    std::memset(preference, 0, sizeof(Preference));
    return SUCCESS;
}
int cublasLtMatmulPreferenceCreate(void** preference) {
    *preference = new Preference{0};
    return SUCCESS;
}
int cublasLtMatmulPreferenceDestroy(void* preference) {
    delete static_cast<Preference*>(preference);
    return SUCCESS;
}
int cublasLtMatmulPreferenceSetAttribute(void* preference, int attribute, const void* value, size_t bytes) {
    return attribute == MOST_WORKSPACE ? take(static_cast<Preference*>(preference)->workspace, value, bytes)
                                       : int{SUCCESS};
}

// Up to two algorithms: one with a workspace, where the preference grants it, and one without.
int cublasLtMatmulAlgoGetHeuristic(
    void* handle, void* operation, void* a, void* b, void* c, void* d, void* preference, int wanted, Heuristic* results,
    int* found
) {
    if (!handle) return NOT_INITIALIZED;
    if (!operation || !a || !b || !c || !d || wanted < 1 || !results || !found) return INVALID_VALUE;
    *found = 0;
    if (!fits(
            *static_cast<Operation*>(operation), *static_cast<Layout*>(a), *static_cast<Layout*>(b),
            *static_cast<Layout*>(c), *static_cast<Layout*>(d)
        ))
        return NOT_SUPPORTED;
    const uint64_t granted = preference ? static_cast<Preference*>(preference)->workspace : 0;
    for (const size_t workspace : {ALGORITHM_WORKSPACE, size_t{0}}) {
        if (*found == wanted || workspace > granted) continue;
        results[(*found)++] = {{ALGORITHM, workspace, 0, 0, 0, 0, 0, 0}, workspace, SUCCESS, 1.0f, {0, 0, 0, 0}};
    }
    return SUCCESS;
}
int cublasLtMatmulAlgoInit(void*, int, int, int, int, int, int, int, void* algorithm) {
    std::memset(algorithm, 0, sizeof(Heuristic::algorithm));
    std::memcpy(algorithm, &ALGORITHM, sizeof ALGORITHM);
    return SUCCESS;
}
int cublasLtMatmulAlgoConfigSetAttribute(void*, int, const void*, size_t) { return SUCCESS; }

int cublasLtMatmul(
    void* handle, void* operation, const void*, const void* a, void* a_layout, const void* b, void* b_layout,
    const void* beta, const void* c, void* c_layout, void* d, void* d_layout, const uint64_t* algorithm,
    void* workspace, size_t workspace_bytes, cudaStream_t stream
) {
    if (!handle) return NOT_INITIALIZED;
    if (!operation || !a_layout || !b_layout || !c_layout || !d_layout) return INVALID_VALUE;
    const auto& how = *static_cast<Operation*>(operation);
    const auto &of_a = *static_cast<Layout*>(a_layout), &of_b = *static_cast<Layout*>(b_layout);
    const auto &of_c = *static_cast<Layout*>(c_layout), &of_d = *static_cast<Layout*>(d_layout);
    if (!fits(how, of_a, of_b, of_c, of_d)) return INVALID_VALUE;
    if (algorithm && (algorithm[0] != ALGORITHM || algorithm[1] > workspace_bytes)) return INVALID_VALUE;
    stand_in::Product one{
        "cublasLt",
        {"NTC"[how.transpose_a], "NTC"[how.transpose_b]},
        stand_in::type_name(of_a.type),
        stand_in::type_name(of_b.type),
        stand_in::type_name(of_d.type),
        stand_in::compute_name(how.compute),
        epilogue_name(how.epilogue),
        static_cast<long long>(of_d.rows),
        static_cast<long long>(of_d.columns),
        static_cast<long long>(how.transpose_a ? of_a.rows : of_a.columns),
        of_a.batch,
        {{"A", a, bytes_of(of_a)}, {"B", b, bytes_of(of_b)}, {"D", d, bytes_of(of_d)}}
    };
    if (c && c != d && beta) one.operands.push_back({"C", c, bytes_of(of_c)});
    if (workspace_bytes) one.operands.push_back({"the workspace", workspace, workspace_bytes});
    if (how.epilogue & EPILOGUE_BIAS)
        one.operands.push_back(
            {"the bias", how.bias, of_d.rows * stand_in::type_bytes(how.bias_type < 0 ? of_d.type : how.bias_type)}
        );
    return stand_in::enqueue(stream, one) == cudaSuccess ? SUCCESS : EXECUTION_FAILED;
}

// Changes of layout are not played: no graph of this project makes use of them.
int cublasLtMatrixTransformDescCreate(void**, int) { return NOT_SUPPORTED; }
int cublasLtMatrixTransformDescDestroy(void*) { return NOT_SUPPORTED; }
int cublasLtMatrixTransform() { return NOT_SUPPORTED; }

}  // extern "C"
