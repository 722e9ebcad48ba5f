// Linear layers through cuBLASLt. The library thinks in columns: a row-major (N,OC) matrix is to it an (OC,N) matrix
// whose columns lie one after another. So each product is asked for transposed, outᵀ = w · inpᵀ, and no data moves.
//
// What the library can add on the way out it adds there: the bias, and where that pays the tanh GELU and its slope. The
// erf GELU, and every GELU in fp32, are kernels of our own: the library's GELU is the tanh form in the precision of the
// hardware's tanh, which bf16 hides and fp32 does not. The bias gradient comes with the weights': the library reads
// dout for both. It overwrites where ours adds up, so its sums go beside the work space first.
#include "matmul.h"

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include <cublasLt.h>

#include "../runtime/device/memory.h"
#include "common.h"
#include "device.h"
#include "launch.h"

namespace {

constexpr cudaDataType_t kReal = sizeof(real) == sizeof(float) ? CUDA_R_32F : CUDA_R_16BF;

// The first compute capability on which the tanh GELU and its slope are fused. llm.c measured that they pay on H100,
// and that before it a pass of their own is faster; not measured here. In fp32 they are never fused: see above.
constexpr int kGeluFusedFrom = 9;

void check_cublas(cublasStatus_t status, const char* what) {
    if (status != CUBLAS_STATUS_SUCCESS) throw RunFailed(std::string(what) + ": " + cublasLtGetStatusString(status));
}

// One product d (M,N) = epilogue(op(a) (M,K) · op(b) (K,N)), in the library's letters and column-major, and all that
// decides its kernel but the alignment of the pointers. Columns follow each other without gaps.
struct Product {
    int64_t M, N, K;
    bool a_transposed = false, b_transposed = false; // stored (K,M), stored (N,K)
    bool accumulate = false;                         // d += instead of =
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    cudaDataType_t type = kReal; // of d; a and b are real

    auto operator<=>(const Product&) const = default;
};

struct Operands {
    void* d;
    const void *a, *b;
    const void* bias = nullptr; // (M) real; written by BGRADB, (N) of d's type
    const void* aux = nullptr;  // (M,N) real: the pre-activation, written by GELU_AUX and read by DGELU
};

struct Destroy {
    void operator()(cublasLtMatmulDesc_t p) const { cublasLtMatmulDescDestroy(p); }
    void operator()(cublasLtMatrixLayout_t p) const { cublasLtMatrixLayoutDestroy(p); }
    void operator()(cublasLtMatmulPreference_t p) const { cublasLtMatmulPreferenceDestroy(p); }
};
template <class Handle> using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Destroy>;

struct Prepared {
    Owned<cublasLtMatmulDesc_t> description;
    Owned<cublasLtMatrixLayout_t> a, b, d;
    cublasLtMatmulAlgo_t algorithm;
    cublasStatus_t status; // success, or why there is no algorithm
};

// The largest power of two that divides the address, up to the 16 bytes that a thread moves at once: beyond, the
// library might choose another kernel, and so other bits, for the same product at another place.
uint32_t alignment(const void* p) {
    uintptr_t address = reinterpret_cast<uintptr_t>(p) | 16;
    return static_cast<uint32_t>(address & (~address + 1));
}
using Alignments = std::array<uint32_t, 5>;
Alignments alignments(const Operands& o) {
    return {alignment(o.a), alignment(o.b), alignment(o.d), alignment(o.bias), alignment(o.aux)};
}

Owned<cublasLtMatrixLayout_t> layout(cudaDataType_t type, int64_t rows, int64_t columns) {
    cublasLtMatrixLayout_t created = nullptr;
    check_cublas(cublasLtMatrixLayoutCreate(&created, type, rows, columns, rows), "matmul: describing a matrix");
    return Owned<cublasLtMatrixLayout_t>(created);
}

template <class T> void set(cublasLtMatmulDesc_t description, cublasLtMatmulDescAttributes_t attribute, T value) {
    check_cublas(cublasLtMatmulDescSetAttribute(description, attribute, &value, sizeof value),
                 "matmul: describing a product");
}
template <class T>
void set(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute, T value) {
    check_cublas(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value),
                 "matmul: stating a preference");
}

// Puts this call's bias and pre-activation into the description.
void point(const Prepared& prepared, const Product& p, const Operands& o) {
    if (o.bias) set(prepared.description.get(), CUBLASLT_MATMUL_DESC_BIAS_POINTER, o.bias);
    if (o.aux) {
        set(prepared.description.get(), CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, o.aux);
        set(prepared.description.get(), CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, p.M);
    }
}

Prepared prepare(cublasLtHandle_t handle, size_t workspace_bytes, const Product& p, const Operands& o) {
    Prepared made{};
    cublasLtMatmulDesc_t description = nullptr;
    // Plain 32F: sums in float, and operands in fp32 builds are not cut to TF32.
    check_cublas(cublasLtMatmulDescCreate(&description, CUBLAS_COMPUTE_32F, CUDA_R_32F),
                 "matmul: describing a product");
    made.description.reset(description);
    set(description, CUBLASLT_MATMUL_DESC_TRANSA, p.a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(description, CUBLASLT_MATMUL_DESC_TRANSB, p.b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(description, CUBLASLT_MATMUL_DESC_EPILOGUE, p.epilogue);
    point(made, p, o); // the heuristic looks at these pointers' alignment
    made.a = p.a_transposed ? layout(kReal, p.K, p.M) : layout(kReal, p.M, p.K);
    made.b = p.b_transposed ? layout(kReal, p.N, p.K) : layout(kReal, p.K, p.N);
    made.d = layout(p.type, p.M, p.N);

    cublasLtMatmulPreference_t created = nullptr;
    check_cublas(cublasLtMatmulPreferenceCreate(&created), "matmul: stating a preference");
    Owned<cublasLtMatmulPreference_t> preference(created);
    set(created, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace_bytes);
    // Parts of a sum that was split along K are added in float, in a fixed order: not in the output's bf16.
    set(created, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, uint32_t{CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE});
    set(created, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(o.a));
    set(created, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(o.b));
    set(created, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(o.d));
    set(created, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(o.d));
    cublasLtMatmulHeuristicResult_t best{};
    int found = 0;
    made.status = cublasLtMatmulAlgoGetHeuristic(handle, description, made.a.get(), made.b.get(), made.d.get(),
                                                 made.d.get(), created, 1, &best, &found);
    if (made.status == CUBLAS_STATUS_SUCCESS) made.status = found ? best.state : CUBLAS_STATUS_NOT_SUPPORTED;
    made.algorithm = best.algo;
    return made;
}

// ---- The bias gradient: sums of columns ----
//
// A block sums a strip of columns over a run of rows. kAcross threads side by side read 128 bytes of a row (16 each),
// kDown rows at a time; every thread adds up its rows in order, then the block adds its threads' sums in a fixed order.
constexpr int kAcross = 8, kDown = 32, kSumThreads = kAcross * kDown, kSumWarps = kSumThreads / kWarpSize;
// Runs of rows: as many as fill any GPU with blocks once OC is a few hundred, each at least a few rows a thread. That
// bounds the partial sums too: 128 · 65536 columns fit the smaller work space.
constexpr int64_t kMostRuns = 128, kShortestRun = 4 * kDown;

// sums (runs,columns) `=`, or `+=` with Add. m (rows,columns); run r covers rows r·run_rows and the run_rows that
// follow. N neighbours a thread: columns is a multiple of N, and m aligned to it.
template <class T, int N, bool Add> __global__ void __launch_bounds__(kSumThreads)
    column_sums(float* sums, const T* m, int64_t rows, int64_t columns, int64_t run_rows) {
    float* shared = reinterpret_cast<float*>(dynamic_shared()); // (kSumWarps,kAcross·N)
    const int thread = static_cast<int>(threadIdx.x), across = thread % kAcross, down = thread / kAcross;
    const int64_t strip = int64_t{blockIdx.x} * (kAcross * N), column = strip + across * N;
    const int64_t begin = blockIdx.y * run_rows;
    const int64_t end = begin + run_rows < rows ? begin + run_rows : rows;

    float sum[N] = {};
    if (column < columns) {
        const T* p = m + column;
#pragma unroll 4
        for (int64_t row = begin + down; row < end; row += kDown) {
            Pack<T, N> x = load_pack<N>(p + row * columns);
#pragma unroll
            for (int i = 0; i < N; i++) sum[i] += to_float(x[i]);
        }
    }
    // A warp holds kWarpSize/kAcross rows of the same strip: lanes that differ in the bits above kAcross.
#pragma unroll
    for (int i = 0; i < N; i++) {
#pragma unroll
        for (int distance = kAcross; distance < kWarpSize; distance *= 2)
            sum[i] += __shfl_xor_sync(kFullWarp, sum[i], distance);
        if (lane_index() < kAcross) store_shared(shared + warp_index() * (kAcross * N) + across * N + i, sum[i]);
    }
    __syncthreads();
    if (thread < kAcross * N && strip + thread < columns) {
        float total = 0;
#pragma unroll
        for (int warp = 0; warp < kSumWarps; warp++) total += load_shared(shared + warp * (kAcross * N) + thread);
        float* to = sums + blockIdx.y * columns + strip + thread;
        store_global(to, Add ? load_global(to) + total : total);
    }
}

template <class T, int N, bool Add>
void run_column_sums(Stream stream, float* sums, const T* m, int64_t rows, int64_t columns, int64_t run_rows) {
    dim3 grid(blocks_for(columns, kAcross * N), blocks_for(rows, run_rows));
    launch(column_sums<T, N, Add>, grid, kSumThreads, kSumWarps * kAcross * N * sizeof(float), stream, sums, m, rows,
           columns, run_rows);
}
template <bool Add, class T>
void sum_columns(Stream stream, float* sums, const T* m, int64_t rows, int64_t columns, int64_t run_rows) {
    constexpr int N = Pack128<T>::size;
    bool wide = aligned(m) && columns % N == 0;
    (wide ? run_column_sums<T, N, Add> : run_column_sums<T, 1, Add>)(stream, sums, m, rows, columns, run_rows);
}

// ---- The bias where the library does not add it ----
constexpr int kFillThreads = 256;

// out (N,OC) = bias (OC) in each row, for a product that is then added to it and so still rounded once; += with Add.
template <bool Add> __global__ void __launch_bounds__(kFillThreads)
    fill_rows(real* out, const real* bias, int64_t n, int64_t OC) {
    int64_t i = global_thread();
    if (i >= n) return;
    real value = load_global(bias + i % OC);
    if constexpr (Add) assign(value, to_float(load_global(out + i)) + to_float(value));
    store_global(out + i, value);
}

} // namespace

struct Matmul {
    static constexpr int64_t kBiasSums = int64_t(1) << 18; // the most columns whose bias gradient the library makes
    Stream stream;
    cublasLtHandle_t handle = nullptr;
    void* workspace = nullptr;
    size_t workspace_bytes = 0; // without what follows it:
    float* bias_sums = nullptr; // (kBiasSums)
    bool fuses_gelu = false;
    std::map<std::pair<Product, Alignments>, Prepared> cache;

    explicit Matmul(Stream stream) : stream(stream) {}
    ~Matmul() {
        if (workspace) device_free(workspace, workspace_bytes + kBiasSums * sizeof(float));
        cache.clear();
        if (handle) cublasLtDestroy(handle);
    }
    Matmul(const Matmul&) = delete;
    Matmul& operator=(const Matmul&) = delete;

    // Runs the product and says success, or says why the library has no kernel for it: what it refuses to run, it will
    // not be asked for again.
    cublasStatus_t attempt(const Product& p, const Operands& o) {
        std::pair key{p, alignments(o)};
        auto found = cache.find(key);
        if (found == cache.end()) {
            // A training step has a few dozen shapes; only prompts of ever new lengths could make this large.
            constexpr size_t kMostShapes = 512;
            if (cache.size() >= kMostShapes) cache.clear();
            found = cache.emplace(key, prepare(handle, workspace_bytes, p, o)).first;
        }
        Prepared& prepared = found->second;
        if (prepared.status != CUBLAS_STATUS_SUCCESS) return prepared.status;
        point(prepared, p, o);
        const float alpha = 1, beta = p.accumulate ? 1 : 0;
        cublasStatus_t status = cublasLtMatmul(handle, prepared.description.get(), &alpha, o.a, prepared.a.get(), o.b,
                                               prepared.b.get(), &beta, o.d, prepared.d.get(), o.d, prepared.d.get(),
                                               &prepared.algorithm, workspace, workspace_bytes, cuda_stream(stream));
        if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE)
            return prepared.status = status;
        check_cublas(status, ("matmul: running " + name(p)).c_str());
        return CUBLAS_STATUS_SUCCESS;
    }

    void run(const Product& p, const Operands& o) {
        cublasStatus_t status = attempt(p, o);
        if (status != CUBLAS_STATUS_SUCCESS)
            throw RunFailed("matmul: cuBLASLt has no kernel for " + name(p) +
                            " on this GPU: " + cublasLtGetStatusString(status));
    }

    static std::string name(const Product& p) {
        auto size = [](int64_t rows, int64_t columns) {
            return "(" + std::to_string(rows) + "x" + std::to_string(columns) + ")";
        };
        return "the product of " + size(p.M, p.K) + " and " + size(p.K, p.N) + " in " + kPrecision;
    }

    // Epilogues with a GELU want the pre-activation in columns of a multiple of 8 elements, 16-byte aligned.
    bool can_fuse(Gelu kind, int64_t columns, const real* out, const real* pre) const {
        return fuses_gelu && kind == Gelu::tanh && columns % 8 == 0 && aligned(out) && aligned(pre);
    }
};

Matmul* matmul_open(Stream stream) {
    auto mm = std::make_unique<Matmul>(stream);
    int device = 0, major = 0;
    check_cuda(cudaGetDevice(&device), "matmul: asking which GPU is in use");
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
               "matmul: asking for the GPU's compute capability");
    check_cublas(cublasLtCreate(&mm->handle), "matmul: opening cuBLASLt");
    const size_t bytes = matmul_workspace(this_target(), major);
    mm->workspace = device_alloc(bytes);
    mm->workspace_bytes = bytes - Matmul::kBiasSums * sizeof(float);
    mm->bias_sums = reinterpret_cast<float*>(static_cast<char*>(mm->workspace) + mm->workspace_bytes);
    mm->fuses_gelu = kReal == CUDA_R_16BF && major >= kGeluFusedFrom;
    return mm.release();
}
void matmul_close(Matmul* mm) { delete mm; }

void matmul_forward(Matmul* mm, real* out, real* pre, const real* inp, const real* w, const real* bias, int64_t N,
                    int64_t C, int64_t OC, Gelu kind) {
    require(N >= 0 && C > 0 && OC > 0, "matmul_forward: a negative N, or C or OC below 1");
    require(!pre || kind != Gelu::none, "matmul_forward: without a GELU there is no pre-activation apart from out");
    if (N == 0) return;
    // outᵀ (OC,N) = w (OC,C) · inpᵀ (C,N); w's rows are to the library the columns of wᵀ.
    Product p{.M = OC, .N = N, .K = C, .a_transposed = true};
    // Some versions of the library refuse the bias beside a matrix of one row or column.
    bool fuse_bias = bias && C > 1 && OC > 1;
    if ((fuse_bias || !bias) && mm->can_fuse(kind, OC, out, pre)) {
        p.epilogue = bias ? (pre ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_BIAS)
                          : (pre ? CUBLASLT_EPILOGUE_GELU_AUX : CUBLASLT_EPILOGUE_GELU);
        if (mm->attempt(p, {.d = out, .a = w, .b = inp, .bias = bias, .aux = pre}) == CUBLAS_STATUS_SUCCESS) return;
    }
    real* sum = pre ? pre : out;
    p.epilogue = CUBLASLT_EPILOGUE_BIAS;
    bool added = fuse_bias && mm->attempt(p, {.d = sum, .a = w, .b = inp, .bias = bias}) == CUBLAS_STATUS_SUCCESS;
    if (!added) {
        if (bias)
            launch(fill_rows<false>, blocks_for(N * OC, kFillThreads), kFillThreads, 0, mm->stream, sum, bias, N * OC,
                   OC);
        p.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
        p.accumulate = bias != nullptr;
        mm->run(p, {.d = sum, .a = w, .b = inp});
    }
    if (kind != Gelu::none) gelu_forward(mm->stream, out, sum, N * OC, kind);
}

void matmul_forward_add(Matmul* mm, real* out, const real* inp, const real* w, const real* bias, int64_t N, int64_t C,
                        int64_t OC) {
    require(N >= 0 && C > 0 && OC > 0, "matmul_forward_add: a negative N, or C or OC below 1");
    if (N == 0) return;
    Product p{.M = OC, .N = N, .K = C, .a_transposed = true, .accumulate = true};
    if (bias && C > 1 && OC > 1) {
        p.epilogue = CUBLASLT_EPILOGUE_BIAS;
        if (mm->attempt(p, {.d = out, .a = w, .b = inp, .bias = bias}) == CUBLAS_STATUS_SUCCESS) return;
        p.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    }
    if (bias)
        launch(fill_rows<true>, blocks_for(N * OC, kFillThreads), kFillThreads, 0, mm->stream, out, bias, N * OC, OC);
    mm->run(p, {.d = out, .a = w, .b = inp});
}

void matmul_backward_input(Matmul* mm, real* dinp, const real* dout, const real* w, const real* pre, int64_t N,
                           int64_t C, int64_t OC, Gelu kind) {
    require(N >= 0 && C > 0 && OC > 0, "matmul_backward_input: a negative N, or C or OC below 1");
    require((pre != nullptr) == (kind != Gelu::none), "matmul_backward_input: a GELU needs pre, and only a GELU does");
    if (N == 0) return;
    // dinpᵀ (C,N) = wᵀ (C,OC) · doutᵀ (OC,N), both as the library sees what is stored.
    Product p{.M = C, .N = N, .K = OC};
    if (mm->can_fuse(kind, C, dinp, pre)) {
        p.epilogue = CUBLASLT_EPILOGUE_DGELU;
        if (mm->attempt(p, {.d = dinp, .a = w, .b = dout, .aux = pre}) == CUBLAS_STATUS_SUCCESS) return;
        p.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    }
    mm->run(p, {.d = dinp, .a = w, .b = dout});
    if (kind != Gelu::none) gelu_backward(mm->stream, dinp, dinp, pre, N * C, kind);
}

void matmul_backward_input_add(Matmul* mm, real* dinp, const real* dout, const real* w, int64_t N, int64_t C,
                               int64_t OC) {
    require(N >= 0 && C > 0 && OC > 0, "matmul_backward_input_add: a negative N, or C or OC below 1");
    if (N > 0) mm->run({.M = C, .N = N, .K = OC, .accumulate = true}, {.d = dinp, .a = w, .b = dout});
}

void matmul_backward_weight(Matmul* mm, float* dw, float* dbias, const real* dout, const real* inp, int64_t N,
                            int64_t C, int64_t OC) {
    require(N >= 0 && C > 0 && OC > 0, "matmul_backward_weight: a negative N, or C or OC below 1");
    if (N == 0) return;
    // dwᵀ (C,OC) += inpᵀ (C,N) · dout (N,OC); dout is to the library stored transposed.
    if (dw) {
        Product p{.M = C, .N = OC, .K = N, .b_transposed = true, .accumulate = true, .type = CUDA_R_32F};
        if (dbias && OC <= Matmul::kBiasSums) {
            p.epilogue = CUBLASLT_EPILOGUE_BGRADB;
            if (mm->attempt(p, {.d = dw, .a = inp, .b = dout, .bias = mm->bias_sums}) == CUBLAS_STATUS_SUCCESS) {
                sum_columns<true>(mm->stream, dbias, const_cast<const float*>(mm->bias_sums), 1, OC, 1);
                return;
            }
            p.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
        }
        mm->run(p, {.d = dw, .a = inp, .b = dout});
    }
    if (!dbias) return;
    int64_t room = static_cast<int64_t>(mm->workspace_bytes / sizeof(float)) / OC;
    int64_t runs = std::clamp<int64_t>(std::min(N / kShortestRun, room), 1, kMostRuns),
            run_rows = (N + runs - 1) / runs;
    if (runs == 1) {
        sum_columns<true>(mm->stream, dbias, dout, N, OC, N);
        return;
    }
    float* partial = static_cast<float*>(mm->workspace); // (runs,OC)
    sum_columns<false>(mm->stream, partial, dout, N, OC, run_rows);
    sum_columns<true>(mm->stream, dbias, const_cast<const float*>(partial), (N + run_rows - 1) / run_rows, OC,
                      kMostRuns);
}
