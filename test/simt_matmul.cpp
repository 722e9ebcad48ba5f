// dev/simt's cuBLASLt against sums in double: operands of both kinds, both orders, every epilogue.
#include <doctest/doctest.h>

#include <cmath>
#include <random>
#include <vector>

#include <cublasLt.h>

#include "../kernels/types.h"

namespace {

struct Matrix {
    int64_t rows, cols, ld;
    cublasLtOrder_t order;
    std::vector<float> host;
    float* data = nullptr;
    cublasLtMatrixLayout_t layout = nullptr;

    Matrix(int64_t rows, int64_t cols, uint32_t seed, cublasLtOrder_t order = CUBLASLT_ORDER_COL)
        : rows(rows), cols(cols), ld((order == CUBLASLT_ORDER_COL ? rows : cols) + 3), order(order),
          host(ld * (order == CUBLASLT_ORDER_COL ? cols : rows)) {
        std::mt19937 rng(seed);
        std::normal_distribution<float> normal;
        for (float& x : host) x = to_float(to_bf16(normal(rng)));
        REQUIRE(cudaMalloc(&data, host.size() * 4) == cudaSuccess);
        cudaMemcpy(data, host.data(), host.size() * 4, cudaMemcpyHostToDevice);
        cublasLtMatrixLayoutCreate(&layout, CUDA_R_32F, rows, cols, ld);
        cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_ORDER, &order, sizeof order);
    }
    ~Matrix() {
        cudaFree(data);
        cublasLtMatrixLayoutDestroy(layout);
    }
    Matrix(const Matrix&) = delete;
    Matrix& operator=(const Matrix&) = delete;
    float at(int64_t row, int64_t col) const {
        return host[order == CUBLASLT_ORDER_COL ? col * ld + row : row * ld + col];
    }
    void read_back() { cudaMemcpy(host.data(), data, host.size() * 4, cudaMemcpyDeviceToHost); }
};

double gelu(double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }
double gelu_slope(double x) { return (gelu(x + 1e-5) - gelu(x - 1e-5)) / 2e-5; }

struct Call {
    cublasLtHandle_t handle = nullptr;
    cublasLtMatmulDesc_t desc = nullptr;
    float alpha = 1, beta = 0;

    Call() {
        cublasLtCreate(&handle);
        cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    }
    ~Call() {
        cublasLtMatmulDescDestroy(desc);
        cublasLtDestroy(handle);
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;
    template <class T> void set(cublasLtMatmulDescAttributes_t attribute, T value) {
        REQUIRE(cublasLtMatmulDescSetAttribute(desc, attribute, &value, sizeof value) == CUBLAS_STATUS_SUCCESS);
    }
    cublasStatus_t run(Matrix& a, Matrix& b, Matrix& c, Matrix& d) {
        return cublasLtMatmul(handle, desc, &alpha, a.data, a.layout, b.data, b.layout, &beta, c.data, c.layout, d.data,
                              d.layout, nullptr, nullptr, 0, nullptr);
    }
};

constexpr int64_t M = 7, N = 5, K = 33;
constexpr double kTolerance = 33 * 6e-8 * 33; // K additions of K-ish sums

} // namespace

TEST_CASE("op(A) op(B), every transposition and order, alpha and beta") {
    for (bool ta : {false, true})
        for (bool tb : {false, true})
            for (cublasLtOrder_t order : {CUBLASLT_ORDER_COL, CUBLASLT_ORDER_ROW}) {
                Matrix a(ta ? K : M, ta ? M : K, 1, order), b(tb ? N : K, tb ? K : N, 2, order), c(M, N, 3),
                    d(M, N, 4, order);
                Matrix cc(M, N, 3, order);
                Call call;
                call.set(CUBLASLT_MATMUL_DESC_TRANSA, ta ? CUBLAS_OP_T : CUBLAS_OP_N);
                call.set(CUBLASLT_MATMUL_DESC_TRANSB, tb ? CUBLAS_OP_T : CUBLAS_OP_N);
                call.alpha = 0.5f, call.beta = 2;
                REQUIRE(call.run(a, b, cc, d) == CUBLAS_STATUS_SUCCESS);
                d.read_back();
                for (int64_t m = 0; m < M; m++)
                    for (int64_t n = 0; n < N; n++) {
                        double want = 2.0 * cc.at(m, n);
                        for (int64_t k = 0; k < K; k++)
                            want += 0.5 * (ta ? a.at(k, m) : a.at(m, k)) * (tb ? b.at(n, k) : b.at(k, n));
                        CHECK(std::abs(d.at(m, n) - want) < kTolerance);
                    }
            }
}

TEST_CASE("every epilogue") {
    for (cublasLtEpilogue_t epilogue :
         {CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU, CUBLASLT_EPILOGUE_GELU_BIAS, CUBLASLT_EPILOGUE_GELU_AUX,
          CUBLASLT_EPILOGUE_GELU_AUX_BIAS, CUBLASLT_EPILOGUE_DGELU, CUBLASLT_EPILOGUE_DGELU_BGRAD,
          CUBLASLT_EPILOGUE_BGRADA, CUBLASLT_EPILOGUE_BGRADB}) {
        CAPTURE(epilogue);
        Matrix a(M, K, 1), b(K, N, 2), d(M, N, 3), bias(M + N, 1, 4), aux(M, N, 5);
        Call call;
        call.set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
        call.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<void*>(bias.data));
        call.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, static_cast<void*>(aux.data));
        call.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, aux.ld);
        std::vector<float> bias_before = bias.host, aux_before = aux.host;
        REQUIRE(call.run(a, b, d, d) == CUBLAS_STATUS_SUCCESS);
        d.read_back(), bias.read_back(), aux.read_back();
        bool gradient = epilogue == CUBLASLT_EPILOGUE_DGELU || epilogue == CUBLASLT_EPILOGUE_DGELU_BGRAD;
        std::vector<double> want_bias(bias.host.begin(), bias.host.end());
        for (size_t i = 0; i < want_bias.size(); i++) want_bias[i] = bias_before[i];
        if (epilogue == CUBLASLT_EPILOGUE_DGELU_BGRAD || epilogue == CUBLASLT_EPILOGUE_BGRADA)
            for (int64_t m = 0; m < M; m++) want_bias[m] = 0;
        if (epilogue == CUBLASLT_EPILOGUE_BGRADB)
            for (int64_t n = 0; n < N; n++) want_bias[n] = 0;
        for (int64_t m = 0; m < M; m++)
            for (int64_t n = 0; n < N; n++) {
                double x = 0;
                for (int64_t k = 0; k < K; k++) x += double(a.at(m, k)) * b.at(k, n);
                if (epilogue & CUBLASLT_EPILOGUE_BIAS) x += bias_before[m];
                double pre = aux_before[n * aux.ld + m];
                if (epilogue == CUBLASLT_EPILOGUE_GELU_AUX || epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS) pre = x;
                CHECK(std::abs(aux.at(m, n) - pre) < kTolerance);
                if (gradient)
                    x *= gelu_slope(aux_before[n * aux.ld + m]);
                else if (epilogue & CUBLASLT_EPILOGUE_GELU)
                    x = gelu(x);
                CHECK(std::abs(d.at(m, n) - x) < kTolerance);
                if (epilogue == CUBLASLT_EPILOGUE_DGELU_BGRAD) want_bias[m] += x;
            }
        for (int64_t k = 0; k < K; k++) {
            if (epilogue == CUBLASLT_EPILOGUE_BGRADA)
                for (int64_t m = 0; m < M; m++) want_bias[m] += a.at(m, k);
            if (epilogue == CUBLASLT_EPILOGUE_BGRADB)
                for (int64_t n = 0; n < N; n++) want_bias[n] += b.at(k, n);
        }
        for (size_t i = 0; i < want_bias.size(); i++) CHECK(std::abs(bias.host[i] - want_bias[i]) < kTolerance);
    }
}

TEST_CASE("bf16 operands give bf16 or float results") {
    for (cudaDataType_t type : {CUDA_R_16BF, CUDA_R_32F}) {
        Matrix a(M, K, 1), b(K, N, 2);
        auto narrow = [](Matrix& m) {
            std::vector<bf16> all(m.host.size());
            for (size_t i = 0; i < all.size(); i++) all[i] = to_bf16(m.host[i]);
            cudaMemcpy(m.data, all.data(), all.size() * 2, cudaMemcpyHostToDevice);
            cublasLtMatrixLayoutDestroy(m.layout);
            cublasLtMatrixLayoutCreate(&m.layout, CUDA_R_16BF, m.rows, m.cols, m.ld);
        };
        narrow(a), narrow(b);
        Matrix d(M, N, 3);
        cublasLtMatrixLayoutDestroy(d.layout);
        cublasLtMatrixLayoutCreate(&d.layout, type, M, N, d.ld);
        Call call;
        REQUIRE(call.run(a, b, d, d) == CUBLAS_STATUS_SUCCESS);
        d.read_back();
        for (int64_t m = 0; m < M; m++)
            for (int64_t n = 0; n < N; n++) {
                double want = 0;
                for (int64_t k = 0; k < K; k++) want += double(a.at(m, k)) * b.at(k, n);
                int64_t i = n * d.ld + m;
                float got = type == CUDA_R_16BF ? to_float(reinterpret_cast<const bf16*>(d.host.data())[i]) : d.host[i];
                CHECK(std::abs(got - want) < kTolerance + (type == CUDA_R_16BF ? std::abs(want) * 0x1p-8 : 0));
            }
    }
}

TEST_CASE("what the library refuses is refused") {
    Matrix a(M, K, 1), b(K, N, 2), d(M, N, 3), small(M, N - 1, 4);
    Call call;
    CHECK(call.run(b, a, d, d) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(call.run(a, b, small, small) == CUBLAS_STATUS_INVALID_VALUE);
    std::swap(d.data, small.data); // shapes are right, memory is too small
    CHECK(call.run(a, b, d, d) == CUBLAS_STATUS_INVALID_VALUE);
    std::swap(d.data, small.data);
    float* device = d.data;
    d.data = d.host.data(); // host memory
    CHECK(call.run(a, b, d, d) == CUBLAS_STATUS_INVALID_VALUE);
    d.data = device;
    call.set(CUBLASLT_MATMUL_DESC_EPILOGUE, static_cast<cublasLtEpilogue_t>(2));
    CHECK(call.run(a, b, d, d) == CUBLAS_STATUS_NOT_SUPPORTED);
}
