// What training computes on the CPU against formulas in double: odd sizes, strides, both types, several threads, under the
// instruction set that is named.
#include <cstdio>
#include <cstring>

#include "numbers.h"

static double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

static void rms_norm(lk_handle *handle, lk_dtype dtype, int64_t rows, int64_t width, int64_t gap, bool add, bool only_weight) {
    const int64_t x_stride = width + gap, d_stride = width + 2 * gap, sum_stride = width + 3 * gap;
    Array x(dtype, (rows - 1) * x_stride + width), d_out(dtype, (rows - 1) * d_stride + width), weight(dtype, width);
    Array d_sum(dtype, (rows - 1) * sum_stride + width), out(dtype, rows * width), d_x(dtype, rows * width, UNTOUCHED);
    Array rstd(LK_FLOAT32, rows, UNTOUCHED), d_weight(LK_FLOAT32, width, UNTOUCHED);
    lk_rms_norm_args args{};
    args.dtype = dtype, args.rows = rows, args.width = width, args.eps = 1e-5f, args.x = x.data(), args.x_stride = x_stride;
    args.weight = weight.data(), args.out = out.data(), args.rstd = rstd.wide.data();
    CHECK(lk_rms_norm(handle, &args, nullptr) == LK_OK);
    lk_rms_norm_backward_args back{};
    back.dtype = dtype, back.rows = rows, back.width = width, back.d_out = d_out.data(), back.d_out_stride = d_stride;
    if (add) back.d_sum = d_sum.data(), back.d_sum_stride = sum_stride;
    back.x = x.data(), back.x_stride = x_stride, back.weight = weight.data(), back.rstd = rstd.wide.data();
    back.d_x = only_weight ? nullptr : d_x.data(), back.d_weight = add && !only_weight ? nullptr : d_weight.wide.data();
    CHECK(lk_rms_norm_backward(handle, &back) == LK_OK);
    std::vector<double> sums((size_t)width), sizes((size_t)width);
    for (int64_t r = 0; r < rows; r++) {
        double squares = 0, mean = 0;
        for (int64_t i = 0; i < width; i++) squares += x[r * x_stride + i] * x[r * x_stride + i];
        const double inverse = 1 / std::sqrt(squares / (double)width + 1e-5);
        CHECK(near(rstd[r], inverse, 0, LK_FLOAT32));
        for (int64_t i = 0; i < width; i++) {
            const double h = x[r * x_stride + i] * inverse, one = d_out[r * d_stride + i] * h;
            mean += one * weight[i] / (double)width;
            sums[(size_t)i] += one, sizes[(size_t)i] += std::fabs(one);
        }
        for (int64_t i = 0; i < width && !only_weight; i++) {
            const double g = d_out[r * d_stride + i] * weight[i], h = x[r * x_stride + i] * inverse;
            const double exact = inverse * (g - h * mean) + (add ? d_sum[r * sum_stride + i] : 0);
            CHECK(near(d_x[r * width + i], exact, inverse * (std::fabs(g) + std::fabs(h * mean)) + 1, dtype));
        }
    }
    for (int64_t i = 0; i < width; i++) { // the weight met rounded values
        const double lost = (dtype == LK_FLOAT32 ? 2e-6 : std::ldexp(1, -8)) * sizes[(size_t)i] + 1e-6;
        CHECK(back.d_weight ? std::fabs(d_weight[i] - sums[(size_t)i]) <= lost : d_weight[i] == UNTOUCHED);
    }
    if (only_weight) CHECK(d_x[0] == UNTOUCHED);
}

static void rope_and_back(lk_handle *handle, lk_dtype dtype, int64_t tokens, int64_t heads, int64_t dim) {
    Array x(dtype, tokens * heads * dim), out(dtype, tokens * heads * dim), cos(LK_FLOAT32, 0), sin(LK_FLOAT32, 0);
    for (int64_t i = 0; i < tokens * dim / 2; i++)
        cos.wide.push_back((float)std::cos((double)i)), sin.wide.push_back((float)std::sin((double)i));
    lk_rope_args args{};
    args.dtype = dtype, args.tokens = tokens, args.heads = heads, args.head_dim = dim, args.x = x.data();
    args.cos = cos.wide.data(), args.sin = sin.wide.data(), args.out = out.data();
    CHECK(lk_rope(handle, &args, nullptr) == LK_OK);
    args.x = args.out, args.inverse = 1;
    CHECK(lk_rope(handle, &args, nullptr) == LK_OK);
    for (int64_t i = 0; i < tokens * heads * dim; i++)
        CHECK(std::fabs(out[i] - x[i]) <= (dtype == LK_FLOAT32 ? 1e-5 : 0.04));
}

static void swiglu(lk_handle *handle, lk_dtype dtype, int64_t rows, int64_t inner, int64_t gap) {
    const int64_t stride = 2 * inner + gap, d_stride = inner + gap;
    Array both(dtype, (rows - 1) * stride + 2 * inner), d_out(dtype, (rows - 1) * d_stride + inner);
    Array found(dtype, rows * 2 * inner, UNTOUCHED);
    lk_swiglu_backward_args args{};
    args.dtype = dtype, args.rows = rows, args.inner = inner, args.d_out = d_out.data(), args.d_out_stride = d_stride;
    args.gate_up = both.data(), args.gate_up_stride = stride, args.d_gate_up = found.data();
    CHECK(lk_swiglu_backward(handle, &args) == LK_OK);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < inner; i++) {
            const double gate = both[r * stride + i], up = both[r * stride + inner + i], d = d_out[r * d_stride + i];
            const double s = sigmoid(gate);
            CHECK(near(found[r * 2 * inner + i], d * up * s * (1 + gate * (1 - s)), std::fabs(d * up) * (1 + std::fabs(gate)), dtype));
            CHECK(near(found[r * 2 * inner + inner + i], d * gate * s, 0, dtype));
        }
}

// Where token t of head h lies in a tensor whose tokens and heads are apart by `gap` more than their size.
struct Places {
    Places(int64_t heads, int64_t dim, int64_t gap) : head(dim + gap), token(heads * (dim + gap) + gap) {}
    int64_t head, token;
    int64_t operator()(int64_t t, int64_t h) const { return t * token + h * head; }
};

static void attention(lk_handle *handle, lk_dtype dtype, int64_t kv_heads, int64_t group, int64_t dim, int64_t gap, bool causal,
                      std::vector<int32_t> lengths) {
    const int64_t heads = kv_heads * group;
    std::vector<int32_t> starts{0};
    for (int32_t length : lengths) starts.push_back(starts.back() + length);
    const int64_t tokens = starts.back();
    const Places q_at(heads, dim, gap), k_at(kv_heads, dim, gap), v_at(kv_heads, dim, 2 * gap), d_at(heads, dim, 3 * gap);
    const Places out_at(heads, dim, 0), kv_at(kv_heads, dim, 0);
    Array q(dtype, tokens * q_at.token), k(dtype, tokens * k_at.token), v(dtype, tokens * v_at.token);
    Array d_out(dtype, tokens * d_at.token), out(dtype, tokens * heads * dim, UNTOUCHED), lse(LK_FLOAT32, heads * tokens);
    Array dq(dtype, tokens * heads * dim, UNTOUCHED), dk(dtype, tokens * kv_heads * dim, UNTOUCHED), dv = dk;
    lk_varlen_attention_backward_args args{};
    lk_varlen_attention_args &forward = args.forward;
    forward.dtype = dtype, forward.tokens = tokens, forward.sequences = (int64_t)lengths.size(), forward.heads = heads;
    forward.kv_heads = kv_heads, forward.head_dim = dim, forward.causal = causal;
    forward.q = q.data(), forward.q_token_stride = q_at.token, forward.q_head_stride = q_at.head;
    forward.k = k.data(), forward.k_token_stride = k_at.token, forward.k_head_stride = k_at.head;
    forward.v = v.data(), forward.v_token_stride = v_at.token, forward.v_head_stride = v_at.head;
    forward.cu_seqlens = starts.data(), forward.out = out.data(), forward.lse = lse.wide.data();
    CHECK(lk_varlen_attention(handle, &forward) == LK_OK);
    args.d_out = d_out.data(), args.d_out_token_stride = d_at.token, args.d_out_head_stride = d_at.head;
    args.dq = dq.data(), args.dk = dk.data(), args.dv = dv.data();
    CHECK(lk_varlen_attention_backward(handle, &args) == LK_OK);

    std::vector<double> exact_q((size_t)(tokens * heads * dim)), exact_k((size_t)(tokens * kv_heads * dim)), exact_v = exact_k;
    const double scale = 1 / std::sqrt((double)dim), loose = dtype == LK_FLOAT32 ? 1e-5 : 0.03;
    for (size_t s = 0; s < lengths.size(); s++)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t t = starts[s]; t < starts[s + 1]; t++) {
                const int64_t end = causal ? t + 1 : starts[s + 1], kv = h / group;
                std::vector<double> p, dp;
                double most = -1e300, total = 0, mean = 0;
                for (int64_t u = starts[s]; u < end; u++) {
                    double score = 0, one = 0;
                    for (int64_t d = 0; d < dim; d++) {
                        score += q[q_at(t, h) + d] * k[k_at(u, kv) + d] * scale;
                        one += d_out[d_at(t, h) + d] * v[v_at(u, kv) + d];
                    }
                    p.push_back(score), dp.push_back(one), most = std::fmax(most, score);
                }
                for (double &x : p) total += x = std::exp(x - most);
                CHECK(std::fabs(lse[h * tokens + t] - (most / std::log(2.) + std::log2(total))) < 1e-4);
                for (size_t u = 0; u < p.size(); u++) p[u] /= total, mean += p[u] * dp[u];
                for (int64_t d = 0; d < dim; d++) {
                    double exact = 0, size = 0;
                    for (size_t u = 0; u < p.size(); u++) {
                        const double one = p[u] * v[v_at(starts[s] + (int64_t)u, kv) + d];
                        exact += one, size += std::fabs(one);
                    }
                    CHECK(near(out[out_at(t, h) + d], exact, 4 * size, dtype));
                }
                for (size_t u = 0; u < p.size(); u++)
                    for (int64_t d = 0; d < dim; d++) {
                        const int64_t key = starts[s] + (int64_t)u;
                        const double ds = p[u] * (dp[u] - mean) * scale;
                        exact_q[(size_t)(out_at(t, h) + d)] += ds * k[k_at(key, kv) + d];
                        exact_k[(size_t)(kv_at(key, kv) + d)] += ds * q[q_at(t, h) + d];
                        exact_v[(size_t)(kv_at(key, kv) + d)] += p[u] * d_out[d_at(t, h) + d];
                    }
            }
    for (size_t i = 0; i < exact_q.size(); i++) CHECK(std::fabs(dq[(int64_t)i] - exact_q[i]) <= loose * (1 + std::fabs(exact_q[i])));
    for (size_t i = 0; i < exact_k.size(); i++) {
        CHECK(std::fabs(dk[(int64_t)i] - exact_k[i]) <= loose * (1 + std::fabs(exact_k[i])));
        CHECK(std::fabs(dv[(int64_t)i] - exact_v[i]) <= loose * (1 + std::fabs(exact_v[i])));
    }

    const Array before = dk; // each half of the gradients by itself
    args.dq = nullptr, std::memset(dk.data(), 0, (size_t)(tokens * kv_heads * dim) * (dtype == LK_FLOAT32 ? 4 : 2));
    CHECK(lk_varlen_attention_backward(handle, &args) == LK_OK);
    for (int64_t i = 0; i < tokens * kv_heads * dim; i++) CHECK(dk[i] == before[i]);
}

static void refused(lk_handle *handle) {
    lk_varlen_attention_args args{};
    float one[4] = {}, lse[4];
    int32_t starts[3] = {0, 3, 2};
    args.tokens = 2, args.sequences = 2, args.heads = args.kv_heads = 1, args.head_dim = 1, args.q = args.k = args.v = one;
    args.cu_seqlens = starts, args.out = one, args.lse = lse;
    CHECK(lk_varlen_attention(handle, &args) == LK_INVALID_ARGUMENT); // runs backwards
    starts[1] = 1, starts[2] = 1;
    CHECK(lk_varlen_attention(handle, &args) == LK_INVALID_ARGUMENT); // does not reach the end
    starts[2] = 2;
    CHECK(lk_varlen_attention(handle, &args) == LK_OK);
    args.heads = 3, args.kv_heads = 2;
    CHECK(lk_varlen_attention(handle, &args) == LK_INVALID_ARGUMENT);
    args.heads = args.kv_heads = 1, args.head_dim = 257;
    CHECK(lk_varlen_attention(handle, &args) == LK_UNSUPPORTED);
    args.head_dim = 1;
    lk_varlen_attention_backward_args back{};
    back.forward = args, back.d_out = one, back.dk = one;
    CHECK(lk_varlen_attention_backward(handle, &back) == LK_INVALID_ARGUMENT); // dk without dv
    back.dk = nullptr, back.d_out = nullptr;
    CHECK(lk_varlen_attention_backward(handle, &back) == LK_INVALID_ARGUMENT);
    lk_swiglu_backward_args gate{};
    gate.rows = gate.inner = 1, gate.d_out = one, gate.gate_up = one;
    CHECK(lk_swiglu_backward(handle, &gate) == LK_INVALID_ARGUMENT);
    lk_rms_norm_backward_args norm{};
    norm.rows = norm.width = 1, norm.d_out = norm.x = norm.weight = one;
    CHECK(lk_rms_norm_backward(handle, &norm) == LK_INVALID_ARGUMENT);
    norm.dtype = LK_FLOAT16;
    CHECK(lk_rms_norm_backward(handle, &norm) == LK_UNSUPPORTED);
}

int main(int count, char **words) {
    const char *name = count > 1 ? words[1] : "portable";
    lk_handle *handle;
    CHECK(lk_create(&handle, LK_CPU) == LK_OK);
    if (lk_set_instructions(handle, name) != LK_OK) return std::puts(lk_last_error(handle)), lk_destroy(handle), 77;
    refused(handle);
    for (int threads : {1, 3})
        for (lk_dtype dtype : {LK_FLOAT32, LK_BFLOAT16})
            for (int64_t gap : {0, 5}) {
                CHECK(lk_set_threads(handle, threads) == LK_OK);
                for (int64_t width : {1, 16, 67, 300})
                    for (int64_t rows : {1, 3, 250}) { // the last: more than a task takes
                        rms_norm(handle, dtype, rows, width, gap, false, false), rms_norm(handle, dtype, rows, width, gap, true, false);
                        rms_norm(handle, dtype, rows, width, gap, false, true);
                        swiglu(handle, dtype, rows, width, gap);
                    }
                for (int64_t dim : {2, 30, 64}) rope_and_back(handle, dtype, 3, 2, dim);
                for (bool causal : {true, false}) {
                    attention(handle, dtype, 1, 1, 18, gap, causal, {1, 5, 0, 130});
                    attention(handle, dtype, 2, 3, 64, gap, causal, {67});
                    attention(handle, dtype, 1, 2, 160, gap, causal, {3, 70}); // longer sums than are taken at once
                }
            }
    lk_destroy(handle);
    if (failures) std::printf("%d failures\n", failures);
    return failures != 0;
}
