// cuBLASLt on the CPU: operands widened to float, one product through oneDNN, then the epilogue element by element.
// Everything is column-major unless a layout says otherwise: element (row, col) of an M×N matrix lies at col·ld + row.
#include "include/cublasLt.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include <oneapi/dnnl/dnnl.h>

#include "../../kernels/types.h"
#include "block.h"
#include "streams.h"

struct cublasLtContext {};
struct cublasLtMatmulPreferenceOpaque {};
struct cublasLtMatrixLayoutOpaque {
    cudaDataType_t type;
    int64_t rows, cols, ld;
    cublasLtOrder_t order;
};
struct cublasLtMatmulDescOpaque {
    cublasOperation_t trans_a = CUBLAS_OP_N, trans_b = CUBLAS_OP_N;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    void *bias = nullptr, *aux = nullptr;
    int64_t aux_ld = 0;
    int bias_type = -1, aux_type = -1; // -1: as D
};

namespace {

size_t type_bytes(int type) { return type == CUDA_R_16BF ? 2 : 4; }
bool known_type(int type) { return type == CUDA_R_32F || type == CUDA_R_16BF; }

float get(const void* p, int type, int64_t i) {
    return type == CUDA_R_16BF ? to_float(static_cast<const bf16*>(p)[i]) : static_cast<const float*>(p)[i];
}
void put(void* p, int type, int64_t i, float x) {
    if (type == CUDA_R_16BF)
        static_cast<bf16*>(p)[i] = to_bf16(x);
    else
        static_cast<float*>(p)[i] = x;
}

int64_t at(const cublasLtMatrixLayoutOpaque& m, int64_t row, int64_t col) {
    return m.order == CUBLASLT_ORDER_ROW ? row * m.ld + col : col * m.ld + row;
}

// Whether `elements` of the type at p lie within one device allocation, aligned to the type.
bool on_device(const void* p, int type, int64_t elements) {
    simt::HeapAnswer answer = simt::look_up(reinterpret_cast<uintptr_t>(p));
    size_t bytes = type_bytes(type);
    return answer.state == simt::HeapState::inside && reinterpret_cast<uintptr_t>(p) % bytes == 0 &&
           answer.end - reinterpret_cast<uintptr_t>(p) >= static_cast<size_t>(elements) * bytes;
}
bool holds(const void* p, const cublasLtMatrixLayoutOpaque& m) {
    return on_device(p, m.type, at(m, m.rows - 1, m.cols - 1) + 1);
}

// Floats of an operand or of the result at a time, so that tests past 2^31 elements hold few of them, and those in the
// cache. Beyond, the sum over K is cut.
constexpr int64_t kMostWidened = int64_t{1} << 22;

struct Run {
    int64_t begin, end;
    int64_t size() const { return end - begin; }
};

// These rows and columns of the matrix, or of its transpose, as floats row-major; in strips, within which a line of
// memory stays in the cache until the next row needs it.
std::vector<float> widened(const void* p, const cublasLtMatrixLayoutOpaque& m, bool transposed, Run rows, Run cols) {
    constexpr int64_t kStrip = 64;
    std::vector<float> out(static_cast<size_t>(rows.size()) * cols.size());
    const int64_t row_step = at(m, !transposed, transposed), col_step = at(m, transposed, !transposed);
    auto widen = [&](const auto* from) {
#pragma omp parallel for schedule(static)
        for (int64_t strip = cols.begin; strip < cols.end; strip += kStrip)
            for (int64_t r = rows.begin; r < rows.end; r++) {
                float* row = out.data() + (r - rows.begin) * cols.size() - cols.begin;
                for (int64_t c = strip; c < std::min(strip + kStrip, cols.end); c++)
                    row[c] = to_float(from[r * row_step + c * col_step]);
            }
    };
    m.type == CUDA_R_16BF ? widen(static_cast<const bf16*>(p)) : widen(static_cast<const float*>(p));
    return out;
}

const float kSqrt2OverPi = 0.7978845608f;
float gelu(float x) { return 0.5f * x * (1 + std::tanh(kSqrt2OverPi * (x + 0.044715f * x * x * x))); }
float gelu_slope(float x) {
    float t = std::tanh(kSqrt2OverPi * (x + 0.044715f * x * x * x));
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * kSqrt2OverPi * (1 + 3 * 0.044715f * x * x);
}

bool has(cublasLtEpilogue_t epilogue, int bits) { return (epilogue & bits) == bits; }

template <class T> cublasStatus_t set(T& field, const void* value, size_t bytes) {
    if (bytes != sizeof(T)) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(&field, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

} // namespace

const char* cublasGetStatusString(cublasStatus_t status) {
    switch (status) {
    case CUBLAS_STATUS_SUCCESS:
        return "success";
    case CUBLAS_STATUS_ALLOC_FAILED:
        return "the resource allocation failed";
    case CUBLAS_STATUS_INVALID_VALUE:
        return "an invalid value was given";
    case CUBLAS_STATUS_NOT_SUPPORTED:
        return "not supported";
    case CUBLAS_STATUS_EXECUTION_FAILED:
        return "the GPU program failed to execute";
    }
    return "unknown status";
}
const char* cublasLtGetStatusString(cublasStatus_t status) { return cublasGetStatusString(status); }
size_t cublasLtGetVersion() { return 0; }

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    *handle = new cublasLtContext;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc, cublasComputeType_t, cudaDataType_t scale) {
    if (scale != CUDA_R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
    *desc = new cublasLtMatmulDescOpaque;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) {
    delete desc;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t bytes) {
    switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
        return set(desc->trans_a, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB:
        return set(desc->trans_b, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
        return set(desc->epilogue, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
        return set(desc->bias, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER:
        return set(desc->aux, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD:
        return set(desc->aux_ld, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE:
        return set(desc->bias_type, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE:
        return set(desc->aux_type, value, bytes);
    default:
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType_t type, uint64_t rows,
                                          uint64_t cols, int64_t ld) {
    if (!known_type(type)) return CUBLAS_STATUS_NOT_SUPPORTED;
    *layout = new cublasLtMatrixLayoutOpaque{type, static_cast<int64_t>(rows), static_cast<int64_t>(cols), ld,
                                             CUBLASLT_ORDER_COL};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    delete layout;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute, const void* value,
                                                size_t bytes) {
    if (attribute != CUBLASLT_MATRIX_LAYOUT_ORDER) return CUBLAS_STATUS_NOT_SUPPORTED;
    return set(layout->order, value, bytes);
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
    *preference = new cublasLtMatmulPreferenceOpaque;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    delete preference;
    return CUBLAS_STATUS_SUCCESS;
}
// There is one algorithm here, and it needs no work space.
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t,
                                                    const void*, size_t) {
    return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t check(const cublasLtMatmulDescOpaque& desc, const cublasLtMatrixLayoutOpaque& a,
                            const cublasLtMatrixLayoutOpaque& b, const cublasLtMatrixLayoutOpaque& c,
                            const cublasLtMatrixLayoutOpaque& d) {
    int64_t k = desc.trans_a == CUBLAS_OP_N ? a.cols : a.rows, m = desc.trans_a == CUBLAS_OP_N ? a.rows : a.cols;
    int64_t k_b = desc.trans_b == CUBLAS_OP_N ? b.rows : b.cols, n = desc.trans_b == CUBLAS_OP_N ? b.cols : b.rows;
    if (m != d.rows || n != d.cols || k != k_b || c.rows != d.rows || c.cols != d.cols || m <= 0 || n <= 0 || k <= 0)
        return CUBLAS_STATUS_INVALID_VALUE;
    for (const auto* one : {&a, &b, &c, &d})
        if (one->ld < (one->order == CUBLASLT_ORDER_ROW ? one->cols : one->rows)) return CUBLAS_STATUS_INVALID_VALUE;
    if (a.type != b.type || (a.type == CUDA_R_32F && d.type != CUDA_R_32F) || c.type != d.type)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    switch (desc.epilogue) {
    case CUBLASLT_EPILOGUE_DEFAULT:
        break;
    case CUBLASLT_EPILOGUE_BIAS:
    case CUBLASLT_EPILOGUE_GELU:
    case CUBLASLT_EPILOGUE_GELU_BIAS:
    case CUBLASLT_EPILOGUE_GELU_AUX:
    case CUBLASLT_EPILOGUE_GELU_AUX_BIAS:
    case CUBLASLT_EPILOGUE_DGELU:
    case CUBLASLT_EPILOGUE_DGELU_BGRAD:
    case CUBLASLT_EPILOGUE_BGRADA:
    case CUBLASLT_EPILOGUE_BGRADB:
        // As the library: epilogues want a column-major result.
        if (d.order != CUBLASLT_ORDER_COL) return CUBLAS_STATUS_NOT_SUPPORTED;
        break;
    default:
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
                                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                              cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t, int wanted,
                                              cublasLtMatmulHeuristicResult_t* results, int* found) {
    *found = 0;
    if (wanted < 1) return CUBLAS_STATUS_INVALID_VALUE;
    cublasStatus_t status = check(*desc, *a, *b, *c, *d);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    results[0] = {};
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}

namespace {

// A call as it was made, whatever becomes of its descriptions.
struct Product {
    cublasLtMatmulDescOpaque desc;
    float alpha, beta;
    const void* a;
    cublasLtMatrixLayoutOpaque al;
    const void* b;
    cublasLtMatrixLayoutOpaque bl;
    const void* c;
    cublasLtMatrixLayoutOpaque cl;
    void* d;
    cublasLtMatrixLayoutOpaque dl;

    int64_t M() const { return dl.rows; }
    int64_t N() const { return dl.cols; }
    int64_t K() const { return desc.trans_a == CUBLAS_OP_N ? al.cols : al.rows; }
    bool gradient() const { return has(desc.epilogue, CUBLASLT_EPILOGUE_DGELU); }
    bool bias_of_rows() const { return has(desc.epilogue, CUBLASLT_EPILOGUE_BGRADA) || gradient(); }
    bool bias_gradient() const {
        return has(desc.epilogue, CUBLASLT_EPILOGUE_BGRADA) || has(desc.epilogue, CUBLASLT_EPILOGUE_BGRADB) ||
               desc.epilogue == CUBLASLT_EPILOGUE_DGELU_BGRAD;
    }
    bool adds_bias() const { return has(desc.epilogue, CUBLASLT_EPILOGUE_BIAS); }
    bool uses_aux() const { return desc.epilogue & 128; }
    int bias_type() const { return desc.bias_type < 0 ? dl.type : desc.bias_type; }
    int aux_type() const { return desc.aux_type < 0 ? dl.type : desc.aux_type; }
    int64_t bias_length() const { return bias_gradient() && !bias_of_rows() ? N() : M(); }
    int64_t aux_length() const { return (N() - 1) * desc.aux_ld + M(); }

    cublasStatus_t check_call() const {
        if (cublasStatus_t status = check(desc, al, bl, cl, dl)) return status;
        if (!known_type(bias_type()) || !known_type(aux_type())) return CUBLAS_STATUS_NOT_SUPPORTED;
        if (!holds(a, al) || !holds(b, bl) || !holds(d, dl) || (beta != 0 && !holds(c, cl)) ||
            ((adds_bias() || bias_gradient()) && !on_device(desc.bias, bias_type(), bias_length())) ||
            (uses_aux() && (desc.aux_ld < M() || !on_device(desc.aux, aux_type(), aux_length()))))
            return CUBLAS_STATUS_INVALID_VALUE;
        return CUBLAS_STATUS_SUCCESS;
    }
    // From a matrix's first element to its last.
    std::shared_ptr<simt::Touched> touches(const void* workspace, size_t workspace_bytes) const {
        auto all = std::make_shared<simt::Touched>();
        auto add = [&](const void* p, const cublasLtMatrixLayoutOpaque& m, bool writes) {
            all->add_range(p, (at(m, m.rows - 1, m.cols - 1) + 1) * type_bytes(m.type), writes);
        };
        add(a, al, false), add(b, bl, false), add(d, dl, true);
        if (beta != 0) add(c, cl, false);
        if (adds_bias() || bias_gradient())
            all->add_range(desc.bias, bias_length() * type_bytes(bias_type()), bias_gradient());
        if (uses_aux()) all->add_range(desc.aux, aux_length() * type_bytes(aux_type()), !gradient());
        if (workspace) all->add_range(workspace, workspace_bytes, true);
        return all;
    }
    cudaError_t multiply() const;
};

} // namespace

cudaError_t Product::multiply() const {
    const int64_t M = this->M(), N = this->N(), K = this->K(), bias_length = this->bias_length();
    const bool gradient = this->gradient(), forward = has(desc.epilogue, CUBLASLT_EPILOGUE_GELU),
               bias_of_rows = this->bias_of_rows(), bias_gradient = this->bias_gradient(),
               adds_bias = this->adds_bias(), uses_aux = this->uses_aux();
    const int bias_type = this->bias_type(), aux_type = this->aux_type();

    // Dᵀ (N,M) row-major = op(B)ᵀ (N,K) · op(A)ᵀ (K,M), in pieces of N and K, so that what is widened stays small.
    const int64_t most_n = std::max<int64_t>(kMostWidened / std::max(M, std::min(K, kMostWidened / M)), 1),
                  most_k = std::max<int64_t>(kMostWidened / std::max(M, std::min(N, most_n)), 1);
    std::vector<double> total(bias_gradient ? bias_length : 0);
    std::vector<float> right, left, sum;
    for (Run ns = {0, std::min(most_n, N)}; ns.begin < N; ns = {ns.end, std::min(ns.end + most_n, N)}) {
        sum.resize(static_cast<size_t>(ns.size()) * M);
        for (Run ks = {0, std::min(most_k, K)}; ks.begin < K; ks = {ks.end, std::min(ks.end + most_k, K)}) {
            if (ns.begin == 0 || ks.size() < K) right = widened(a, al, desc.trans_a == CUBLAS_OP_N, ks, {0, M});
            left = widened(b, bl, desc.trans_b == CUBLAS_OP_N, ns, ks);
            if (dnnl_sgemm('N', 'N', ns.size(), M, ks.size(), 1.0f, left.data(), ks.size(), right.data(), M,
                           ks.begin == 0 ? 0.0f : 1.0f, sum.data(), M) != dnnl_success)
                return cudaErrorMemoryAllocation;
            if (!bias_gradient || gradient) continue;
            if (bias_of_rows && ns.begin == 0)
                for (int64_t k = 0; k < ks.size(); k++)
                    for (int64_t m = 0; m < M; m++) total[m] += right[k * M + m];
            if (!bias_of_rows)
                for (int64_t n = ns.begin; n < ns.end; n++)
                    for (int64_t k = 0; k < ks.size(); k++) total[n] += left[(n - ns.begin) * ks.size() + k];
        }

#pragma omp parallel for schedule(static)
        for (int64_t n = ns.begin; n < ns.end; n++) {
            float* row = sum.data() + (n - ns.begin) * M;
            for (int64_t m = 0; m < M; m++) {
                float x = alpha * row[m];
                if (beta != 0) x += beta * get(c, cl.type, at(cl, m, n));
                if (adds_bias) x += get(desc.bias, bias_type, m);
                if (forward) {
                    if (uses_aux) put(desc.aux, aux_type, n * desc.aux_ld + m, x);
                    x = gelu(x);
                }
                if (gradient) x *= gelu_slope(get(desc.aux, aux_type, n * desc.aux_ld + m));
                row[m] = x;
                put(d, dl.type, at(dl, m, n), x);
            }
        }
        for (int64_t n = 0; bias_gradient && gradient && n < ns.size(); n++)
            for (int64_t m = 0; m < M; m++) total[m] += sum[n * M + m];
    }
    for (int64_t j = 0; bias_gradient && j < bias_length; j++)
        put(desc.bias, bias_type, j, static_cast<float>(total[j]));
    return cudaSuccess;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void* alpha, const void* a,
                              cublasLtMatrixLayout_t al, const void* b, cublasLtMatrixLayout_t bl, const void* beta,
                              const void* c, cublasLtMatrixLayout_t cl, void* d, cublasLtMatrixLayout_t dl,
                              const cublasLtMatmulAlgo_t*, void* workspace, size_t workspace_bytes, cudaStream_t stream,
                              SimtPlace place) {
    Product p{*desc, *static_cast<const float*>(alpha), *static_cast<const float*>(beta), a, *al, b, *bl, c, *cl, d,
              *dl};
    if (cublasStatus_t status = p.check_call()) return status;
    if (simt::settings().refuse_epilogues && p.desc.epilogue != CUBLASLT_EPILOGUE_DEFAULT)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    cudaError_t status =
        simt::give(stream, {"cublasLtMatmul", place, nullptr, true, p.touches(workspace, workspace_bytes),
                            [p](simt::Touched*) { return p.multiply(); }});
    return status == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}
