// What a training step computes beside its matrix products, on the CPU.
#include <algorithm>
#include <cstring>

#include "handle.h"

namespace {

using namespace lk;

lk_status check(lk_handle *handle, const char *op, const void *args, lk_dtype dtype) {
    if (lk_status status = cpu_only(handle)) return status;
    if (lk_status status = lk_check_call(handle, args, dtype)) return status;
    return check_dtype(handle, op, dtype);
}

const char *at(lk_dtype dtype, const void *data, int64_t count) {
    return data ? static_cast<const char *>(data) + count * size_of(dtype) : nullptr;
}
char *at(lk_dtype dtype, void *data, int64_t count) {
    return data ? static_cast<char *>(data) + count * size_of(dtype) : nullptr;
}

lk_status check_attention(lk_handle *handle, const lk_varlen_attention_args &args) {
    CHECK_SIZES(handle, {"tokens", args.tokens, 0}, {"sequences", args.sequences, 0}, {"heads", args.heads, 1},
                {"kv_heads", args.kv_heads, 1}, {"head_dim", args.head_dim, 1});
    if (args.heads % args.kv_heads)
        return lk_fail(handle, LK_INVALID_ARGUMENT, "heads is %lld, which is no multiple of kv_heads, %lld",
                       (long long)args.heads, (long long)args.kv_heads);
    if (args.head_dim > MAX_HEAD_DIM)
        return lk_fail(handle, LK_UNSUPPORTED, "varlen_attention on the CPU takes a head_dim up to 256, not %lld",
                       (long long)args.head_dim);
    if (args.tokens == 0) return LK_OK;
    CHECK_POINTERS(handle, {"q", args.q}, {"k", args.k}, {"v", args.v}, {"cu_seqlens", args.cu_seqlens}, {"out", args.out},
                   {"lse", args.lse});
    for (int64_t s = 0; s < args.sequences; s++)
        if (args.cu_seqlens[s + 1] < args.cu_seqlens[s])
            return lk_fail(handle, LK_INVALID_ARGUMENT, "sequence %lld starts at %d and ends at %d", (long long)s,
                           args.cu_seqlens[s], args.cu_seqlens[s + 1]);
    if (args.sequences == 0 || args.cu_seqlens[0] != 0 || args.cu_seqlens[args.sequences] != args.tokens)
        return lk_fail(handle, LK_INVALID_ARGUMENT, "the sequences do not cover the %lld tokens", (long long)args.tokens);
    return LK_OK;
}

// Calls run(task, scratch) for every head of keys of every sequence.
template <class F>
void each_head(lk_cpu &cpu, const lk_varlen_attention_args &args, const lk_varlen_attention_backward_args *backward, F &&run) {
    const lk_dtype dtype = args.dtype;
    const int64_t dim = args.head_dim, group = args.heads / args.kv_heads;
    const int64_t q_head = lk_or(args.q_head_stride, dim), q_token = lk_or(args.q_token_stride, args.heads * q_head);
    const int64_t k_head = lk_or(args.k_head_stride, dim), k_token = lk_or(args.k_token_stride, args.kv_heads * k_head);
    const int64_t v_head = lk_or(args.v_head_stride, dim), v_token = lk_or(args.v_token_stride, args.kv_heads * v_head);
    const int64_t out_token = args.heads * dim, kv_token = args.kv_heads * dim;
    int64_t longest = 0;
    for (int64_t s = 0; s < args.sequences; s++)
        longest = std::max<int64_t>(longest, args.cu_seqlens[s + 1] - args.cu_seqlens[s]);
    const int64_t each = flash_scratch(longest, dim, backward != nullptr);
    float *scratch = cpu.scratch.at_least(each * cpu.pool->threads());
    cpu.pool->each(args.sequences * args.kv_heads, [&](int64_t i, int thread) {
        const int64_t s = i / args.kv_heads, kv = i % args.kv_heads, head = kv * group, start = args.cu_seqlens[s];
        VarlenAttention task{};
        task.dtype = dtype, task.tokens = args.cu_seqlens[s + 1] - start, task.group = group, task.head_dim = dim;
        task.causal = args.causal != 0;
        task.q = at(dtype, args.q, start * q_token + head * q_head), task.q_token = q_token, task.q_head = q_head;
        task.k = at(dtype, args.k, start * k_token + kv * k_head), task.k_token = k_token;
        task.v = at(dtype, args.v, start * v_token + kv * v_head), task.v_token = v_token;
        task.out = at(dtype, args.out, start * out_token + head * dim), task.out_token = out_token;
        task.lse = args.lse + head * args.tokens + start, task.lse_head = args.tokens;
        if (backward) {
            task.d_out_head = lk_or(backward->d_out_head_stride, dim);
            task.d_out_token = lk_or(backward->d_out_token_stride, args.heads * task.d_out_head);
            task.d_out = at(dtype, backward->d_out, start * task.d_out_token + head * task.d_out_head);
            task.dq = at(dtype, backward->dq, start * out_token + head * dim);
            task.dk = at(dtype, backward->dk, start * kv_token + kv * dim);
            task.dv = at(dtype, backward->dv, start * kv_token + kv * dim), task.d_kv_token = kv_token;
        }
        if (task.tokens) run(task, scratch + thread * each);
    });
}

} // namespace

extern "C" {

lk_status lk_rms_norm_backward(lk_handle *handle, const lk_rms_norm_backward_args *args) {
    if (lk_status status = check(handle, "rms_norm_backward", args, args ? args->dtype : LK_FLOAT32)) return status;
    CHECK_SIZES(handle, {"rows", args->rows, 0}, {"width", args->width, 1});
    if (args->rows)
        CHECK_POINTERS(handle, {"d_out", args->d_out}, {"x", args->x}, {"weight", args->weight}, {"rstd", args->rstd});
    return guarded(handle, [&] {
        lk_cpu &cpu = *handle->cpu;
        const int64_t width = args->width, padded = cdiv(width, 16) * 16; // whole vectors
        const RmsNormBackward task{args->dtype, width, args->d_out, args->d_sum, args->x, args->weight,
                                   lk_or(args->d_out_stride, width), lk_or(args->d_sum_stride, width),
                                   lk_or(args->x_stride, width), args->rstd, args->d_x};
        int64_t parts = 0; // each sums d_weight on its own, and the sums are added in order
        float *sums = nullptr;
        if (args->d_weight) {
            parts = cdiv(args->rows, std::max<int64_t>(PART_VALUES / width, 1));
            sums = cpu.scratch.at_least(parts * padded);
            std::memset(sums, 0, (size_t)(parts * padded) * sizeof(float));
        }
        share_rows(cpu, args->rows, width, [&](int64_t first, int64_t last, int64_t part) {
            cpu.isa->rms_norm_backward(task, first, last, sums ? sums + part * padded : nullptr);
        });
        if (args->d_weight) std::memset(args->d_weight, 0, (size_t)width * sizeof(float));
        for (int64_t part = 0; part < parts; part++)
            for (int64_t i = 0; i < width; i++) args->d_weight[i] += sums[part * padded + i];
        return LK_OK;
    });
}

lk_status lk_swiglu_backward(lk_handle *handle, const lk_swiglu_backward_args *args) {
    if (lk_status status = check(handle, "swiglu_backward", args, args ? args->dtype : LK_FLOAT32)) return status;
    CHECK_SIZES(handle, {"rows", args->rows, 0}, {"inner", args->inner, 1});
    if (args->rows == 0) return LK_OK;
    CHECK_POINTERS(handle, {"d_out", args->d_out}, {"gate_up", args->gate_up}, {"d_gate_up", args->d_gate_up});
    const Swiglu task{args->dtype, args->inner, args->gate_up, args->d_out, lk_or(args->gate_up_stride, 2 * args->inner),
                      lk_or(args->d_out_stride, args->inner), args->d_gate_up};
    share_rows(*handle->cpu, args->rows, 5 * args->inner,
               [&](int64_t first, int64_t last, int64_t) { handle->cpu->isa->swiglu_rows_backward(task, first, last); });
    return LK_OK;
}

lk_status lk_varlen_attention(lk_handle *handle, const lk_varlen_attention_args *args) {
    if (lk_status status = check(handle, "varlen_attention", args, args ? args->dtype : LK_FLOAT32)) return status;
    if (lk_status status = check_attention(handle, *args)) return status;
    return guarded(handle, [&] {
        lk_cpu &cpu = *handle->cpu;
        if (args->tokens) each_head(cpu, *args, nullptr, cpu.isa->varlen_attention);
        return LK_OK;
    });
}

lk_status lk_varlen_attention_backward(lk_handle *handle, const lk_varlen_attention_backward_args *args) {
    if (lk_status status = check(handle, "varlen_attention_backward", args, args ? args->forward.dtype : LK_FLOAT32))
        return status;
    if (lk_status status = check_attention(handle, args->forward)) return status;
    if (!args->dk != !args->dv)
        return lk_fail(handle, LK_INVALID_ARGUMENT, "dk and dv go together: one of them is NULL");
    if (args->forward.tokens == 0) return LK_OK;
    CHECK_POINTERS(handle, {"d_out", args->d_out});
    return guarded(handle, [&] {
        each_head(*handle->cpu, args->forward, args, handle->cpu->isa->varlen_attention_backward);
        return LK_OK;
    });
}

} // extern "C"
