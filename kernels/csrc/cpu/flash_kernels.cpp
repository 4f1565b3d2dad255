// Attention inside one sequence and its backward pass, block by block, so that no matrix of all scores is ever made
// (FlashAttention-2, Dao, arXiv 2307.08691). Compiled for the instruction sets that LK_LIKE names, see
// inner.h.
#include "dense.h"
#include "inner.h"
#include "vectors.h"

namespace {

using lk::FLASH_BLOCK;
using lk::VarlenAttention;
constexpr int64_t B = FLASH_BLOCK;
INLINE const void *beyond(lk_dtype dtype, const void *from, int64_t count) {
    return (const char *)from + count * (dtype == LK_FLOAT32 ? 4 : 2);
}

// Rows of a head, `stride` apart, as (count, width) floats, zeros beyond the head's size.
void gather(const VarlenAttention &task, const void *from, int64_t stride, int64_t count, float *to) {
    const int64_t width = lk::flash_width(task.head_dim);
    for (int64_t t = 0; t < count; t++, to += width) {
        to_float(task.dtype, beyond(task.dtype, from, t * stride), to, task.head_dim);
        for (int64_t d = task.head_dim; d < width; d++) to[d] = 0;
    }
}

// Rows of all tokens as blocks (tokens / B, head_dim, B), zeros beyond the last token.
void gather_turned(const VarlenAttention &task, const void *from, int64_t stride, float *to, float *row) {
    const int64_t width = lk::flash_width(task.head_dim);
    for (int64_t t = 0; t < lk::flash_rows(task.tokens); t++) {
        float *column = to + t / B * B * width + t % B;
        if (t < task.tokens)
            to_float(task.dtype, beyond(task.dtype, from, t * stride), row, task.head_dim);
        else
            memset(row, 0, (size_t)task.head_dim * sizeof(float));
        for (int64_t d = 0; d < task.head_dim; d++) column[d * B] = row[d];
    }
}

void scatter(const VarlenAttention &task, const float *from, int64_t count, float factor, void *to, int64_t stride) {
    const int64_t width = lk::flash_width(task.head_dim);
    float row[lk::MAX_HEAD_DIM];
    for (int64_t t = 0; t < count; t++, from += width) {
        for (int64_t d = 0; d < task.head_dim; d++) row[d] = from[d] * factor;
        from_float(task.dtype, row, const_cast<void *>(beyond(task.dtype, to, t * stride)), task.head_dim);
    }
}

// How many keys of block `keys` row `r` of block `queries` sees.
INLINE int64_t seen(const VarlenAttention &task, int64_t queries, int64_t r, int64_t keys) {
    return least(B, (task.causal ? queries * B + r + 1 : task.tokens) - keys * B);
}

} // namespace

namespace lk::LK_INNER {

void varlen_attention(const VarlenAttention &task, float *scratch) {
    const int64_t width = flash_width(task.head_dim), size = flash_rows(task.tokens) * width, blocks = flash_rows(task.tokens) / B;
    float *k = scratch, *v = k + size, *q = v + size, *out = q + B * width, *p = out + B * width, *row = p + B * B;
    gather_turned(task, task.k, task.k_token, k, row);
    gather(task, task.v, task.v_token, task.tokens, v);
    memset(v + task.tokens * width, 0, (size_t)(size - task.tokens * width) * sizeof(float));
    const float factor = LOG2E / __builtin_sqrtf((float)task.head_dim); // scores are kept in units of log 2
    float most[B], total[B];
    for (int64_t head = 0; head < task.group; head++)
        for (int64_t i = 0; i < blocks; i++) {
            const int64_t rows = least(B, task.tokens - i * B);
            const void *q_at = beyond(task.dtype, task.q, head * task.q_head + i * B * task.q_token);
            gather(task, q_at, task.q_token, rows, q);
            memset(out, 0, (size_t)(rows * width) * sizeof(float));
            for (int64_t r = 0; r < rows; r++) most[r] = -__builtin_inff(), total[r] = 0;
            for (int64_t j = 0; j < (task.causal ? i + 1 : blocks); j++) {
                product(rows, B, task.head_dim, {q, width, 1}, k + j * B * width, B, p, B, false);
                for (int64_t r = 0; r < rows; r++)
                    weights(p + r * B, seen(task, i, r, j), factor, most[r], total[r], out + r * width, width);
                product(rows, width, B, {p, B, 1}, v + j * B * width, width, out, width, true);
            }
            for (int64_t r = 0; r < rows; r++) {
                const int64_t t = i * B + r;
                void *to = const_cast<void *>(beyond(task.dtype, task.out, t * task.out_token + head * task.head_dim));
                scatter(task, out + r * width, 1, 1.f / total[r], to, 0);
                task.lse[head * task.lse_head + t] = most[r] + __builtin_log2f(total[r]);
            }
        }
}

// With p the weights and dp = d_out v^T: ds = p (dp - sum(d_out out)), dv = p^T d_out, dk = ds^T q, dq = ds k.
void varlen_attention_backward(const VarlenAttention &task, float *scratch) {
    const int64_t width = flash_width(task.head_dim), size = flash_rows(task.tokens) * width, blocks = flash_rows(task.tokens) / B;
    float *k = scratch, *k_turned = k + size, *v_turned = k_turned + size, *q = v_turned + size, *d_out = q + size;
    float *dq = d_out + size, *dk = dq + size, *dv = dk + size, *delta = dv + size, *p = delta + flash_rows(task.tokens);
    float *ds = p + B * B, *row = ds + B * B;
    const float scale = 1.f / __builtin_sqrtf((float)task.head_dim), factor = LOG2E * scale;
    const int64_t tokens = task.tokens, held = tokens * width;
    gather(task, task.k, task.k_token, tokens, k);
    memset(k + held, 0, (size_t)(size - held) * sizeof(float));
    gather_turned(task, task.k, task.k_token, k_turned, row);
    gather_turned(task, task.v, task.v_token, v_turned, row);
    memset(dk, 0, (size_t)(2 * size) * sizeof(float)); // and dv
    for (int64_t head = 0; head < task.group; head++) {
        gather(task, beyond(task.dtype, task.q, head * task.q_head), task.q_token, tokens, q);
        gather(task, beyond(task.dtype, task.d_out, head * task.d_out_head), task.d_out_token, tokens, d_out);
        for (int64_t t = 0; t < tokens; t++) {
            to_float(task.dtype, beyond(task.dtype, task.out, t * task.out_token + head * task.head_dim), row, task.head_dim);
            float total = 0;
            for (int64_t d = 0; d < task.head_dim; d++) total += row[d] * d_out[t * width + d];
            delta[t] = total;
        }
        memset(dq, 0, (size_t)size * sizeof(float));
        const float *lse = task.lse + head * task.lse_head;
        for (int64_t j = 0; j < blocks; j++)
            for (int64_t i = task.causal ? j : 0; i < blocks; i++) {
                const int64_t rows = least(B, tokens - i * B), keys = least(B, tokens - j * B), at = i * B * width;
                product(rows, B, task.head_dim, {q + at, width, 1}, k_turned + j * B * width, B, p, B, false);
                product(rows, B, task.head_dim, {d_out + at, width, 1}, v_turned + j * B * width, B, ds, B, false);
                for (int64_t r = 0; r < rows; r++) {
                    const float level = lse[i * B + r], mean = delta[i * B + r];
                    for (int64_t t = seen(task, i, r, j); t < B; t++) p[r * B + t] = -__builtin_inff();
                    for (int64_t t = 0; t < B; t += L) {
                        const vf weight = power_of_two(load<vf>(p + r * B + t) * factor - level);
                        store(p + r * B + t, weight);
                        store(ds + r * B + t, weight * (load<vf>(ds + r * B + t) - mean));
                    }
                }
                if (task.dk) {
                    product(keys, width, rows, {p, 1, B}, d_out + at, width, dv + j * B * width, width, true);
                    product(keys, width, rows, {ds, 1, B}, q + at, width, dk + j * B * width, width, true);
                }
                if (task.dq) product(rows, width, keys, {ds, B, 1}, k + j * B * width, width, dq + at, width, true);
            }
        if (task.dq)
            scatter(task, dq, tokens, scale, const_cast<void *>(beyond(task.dtype, task.dq, head * task.head_dim)), task.out_token);
    }
    if (task.dk) {
        scatter(task, dk, tokens, scale, task.dk, task.d_kv_token);
        scatter(task, dv, tokens, 1.f, task.dv, task.d_kv_token);
    }
}

} // namespace lk::LK_INNER
