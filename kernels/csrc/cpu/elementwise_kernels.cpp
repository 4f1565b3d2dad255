// rms_norm, rope and swiglu over rows, and their backward passes: each reads its operands once and writes its result
// once. Compiled for the instruction sets that LK_LIKE names, see inner.h.
#include "inner.h"
#include "vectors.h"

namespace {

constexpr int64_t CHUNK = 256; // values that are worked on at a time: bfloat16 is copied to floats on the stack

INLINE bool direct(lk_dtype dtype, int64_t count) { return dtype == LK_FLOAT32 && count % L == 0; }
INLINE int64_t bytes(lk_dtype dtype) { return dtype == LK_FLOAT32 ? 4 : 2; }

// Values at..at+count-1 as whole vectors of floats: where they lie if they can be read so, else copied.
INLINE const float *floats(lk_dtype dtype, const void *from, int64_t at, int64_t count, float *copy) {
    if (direct(dtype, count)) return (const float *)from + at;
    to_float(dtype, (const char *)from + at * bytes(dtype), copy, count);
    for (int64_t i = count; i % L; i++) copy[i] = 0;
    return copy;
}

// Where to put whole vectors of floats that are to become values at..at+count-1; `put` brings them there.
INLINE float *room(lk_dtype dtype, void *to, int64_t at, int64_t count, float *copy) {
    return direct(dtype, count) ? (float *)to + at : copy;
}
INLINE void put(lk_dtype dtype, void *to, int64_t at, int64_t count, const float *copy) {
    if (!direct(dtype, count)) from_float(dtype, copy, (char *)to + at * bytes(dtype), count);
}

// As values of the type are rounded: what llama's norm does before it applies the weight.
INLINE vf rounded(lk_dtype dtype, vf x) {
    const vu bits = (vu)x;
    return dtype == LK_FLOAT32 ? x : (vf)((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
}

INLINE vf sigmoid(vf x) { return 1.f / (exponential(-x) + 1.f); }

} // namespace

namespace lk::LK_INNER {

void rms_norm(const RmsNorm &task, int64_t first, int64_t last) {
    const int64_t width = task.width;
    float a[CHUNK], b[CHUNK], c[CHUNK];
    for (int64_t row = first; row < last; row++) {
        const void *x = task.x;
        int64_t at = row * task.x_stride;
        if (task.residual) { // what is normed is the sum as the next layer gets it, rounding included
            for (int64_t from = 0; from < width; from += CHUNK) {
                const int64_t count = least(CHUNK, width - from);
                const float *one = floats(task.dtype, x, at + from, count, a);
                const float *two = floats(task.dtype, task.residual, row * task.residual_stride + from, count, b);
                float *sum = room(task.dtype, task.sum, row * width + from, count, c);
                for (int64_t i = 0; i < count; i += L) store(sum + i, load<vf>(one + i) + load<vf>(two + i));
                put(task.dtype, task.sum, row * width + from, count, sum);
            }
            x = task.sum, at = row * width;
        }
        vf squares = {};
        for (int64_t from = 0; from < width; from += CHUNK) {
            const int64_t count = least(CHUNK, width - from);
            const float *some = floats(task.dtype, x, at + from, count, a);
            for (int64_t i = 0; i < count; i += L) squares += load<vf>(some + i) * load<vf>(some + i);
        }
        const float rstd = 1.f / __builtin_sqrtf(sum(squares) / (float)width + task.eps);
        if (task.rstd) task.rstd[row] = rstd;
        for (int64_t from = 0; from < width; from += CHUNK) {
            const int64_t count = least(CHUNK, width - from);
            const float *some = floats(task.dtype, x, at + from, count, a);
            const float *weight = floats(task.dtype, task.weight, from, count, b);
            float *out = room(task.dtype, task.out, row * width + from, count, c);
            for (int64_t i = 0; i < count; i += L) store(out + i, rounded(task.dtype, load<vf>(some + i) * rstd) * load<vf>(weight + i));
            put(task.dtype, task.out, row * width + from, count, out);
        }
    }
}

// With h = x * rstd and g = d_out * weight: d_x = rstd * (g - h * mean(g * h)) + d_sum, d_weight += d_out * h, which is h
// as the weight met it, rounded.
void rms_norm_backward(const RmsNormBackward &task, int64_t first, int64_t last, float *d_weight) {
    const int64_t width = task.width;
    float a[CHUNK], b[CHUNK], c[CHUNK], d[CHUNK], e[CHUNK];
    for (int64_t row = first; row < last; row++) {
        const float rstd = task.rstd[row];
        vf total = {};
        for (int64_t from = 0; from < width; from += CHUNK) {
            const int64_t count = least(CHUNK, width - from);
            const float *x = floats(task.dtype, task.x, row * task.x_stride + from, count, a);
            const float *d_out = floats(task.dtype, task.d_out, row * task.d_out_stride + from, count, b);
            const float *weight = floats(task.dtype, task.weight, from, count, c);
            for (int64_t i = 0; i < count; i += L) {
                const vf h = load<vf>(x + i) * rstd, d_o = load<vf>(d_out + i);
                total += d_o * load<vf>(weight + i) * h;
                if (!d_weight) continue;
                store(d_weight + from + i, load<vf>(d_weight + from + i) + d_o * rounded(task.dtype, h));
            }
        }
        if (!task.d_x) continue;
        const float mean = sum(total) / (float)width;
        for (int64_t from = 0; from < width; from += CHUNK) {
            const int64_t count = least(CHUNK, width - from);
            const float *x = floats(task.dtype, task.x, row * task.x_stride + from, count, a);
            const float *d_out = floats(task.dtype, task.d_out, row * task.d_out_stride + from, count, b);
            const float *weight = floats(task.dtype, task.weight, from, count, c);
            const float *d_sum = task.d_sum ? floats(task.dtype, task.d_sum, row * task.d_sum_stride + from, count, d) : nullptr;
            float *d_x = room(task.dtype, task.d_x, row * width + from, count, e);
            for (int64_t i = 0; i < count; i += L) {
                const vf h = load<vf>(x + i) * rstd, g = load<vf>(d_out + i) * load<vf>(weight + i);
                const vf made = (g - h * mean) * rstd;
                store(d_x + i, d_sum ? made + load<vf>(d_sum + i) : made);
            }
            put(task.dtype, task.d_x, row * width + from, count, d_x);
        }
    }
}

void rope(const Rope &task, int64_t first, int64_t last) {
    const int64_t half = task.head_dim / 2;
    const float sign = task.inverse ? -1.f : 1.f;
    float one[CHUNK], two[CHUNK], some_cos[CHUNK], some_sin[CHUNK], low[CHUNK], high[CHUNK];
    for (int64_t token = first; token < last; token++)
        for (int64_t from = 0; from < half; from += CHUNK) {
            const int64_t count = least(CHUNK, half - from);
            const float *cos = floats(LK_FLOAT32, task.cos, token * half + from, count, some_cos);
            const float *sin = floats(LK_FLOAT32, task.sin, token * half + from, count, some_sin);
            for (int64_t head = 0; head < task.heads; head++) {
                const int64_t at = token * task.x_token_stride + head * task.x_head_stride + from;
                const int64_t to = token * task.out_token_stride + head * task.out_head_stride + from;
                const float *a = floats(task.dtype, task.x, at, count, one);
                const float *b = floats(task.dtype, task.x, at + half, count, two);
                float *upper = room(task.dtype, task.out, to, count, low);
                float *lower = room(task.dtype, task.out, to + half, count, high);
                for (int64_t i = 0; i < count; i += L) { // out may be x
                    const vf u = load<vf>(a + i), v = load<vf>(b + i), c = load<vf>(cos + i), s = load<vf>(sin + i) * sign;
                    store(upper + i, u * c - v * s);
                    store(lower + i, v * c + u * s);
                }
                put(task.dtype, task.out, to, count, upper);
                put(task.dtype, task.out, to + half, count, lower);
            }
        }
}

void swiglu_rows(const Swiglu &task, int64_t first, int64_t last) {
    const int64_t inner = task.inner;
    float a[CHUNK], b[CHUNK], c[CHUNK];
    for (int64_t row = first; row < last; row++)
        for (int64_t from = 0; from < inner; from += CHUNK) {
            const int64_t count = least(CHUNK, inner - from), at = row * task.gate_up_stride + from;
            const float *gate = floats(task.dtype, task.gate_up, at, count, a);
            const float *up = floats(task.dtype, task.gate_up, at + inner, count, b);
            float *out = room(task.dtype, task.out, row * inner + from, count, c);
            for (int64_t i = 0; i < count; i += L) {
                const vf g = load<vf>(gate + i);
                store(out + i, g * sigmoid(g) * load<vf>(up + i));
            }
            put(task.dtype, task.out, row * inner + from, count, out);
        }
}

void swiglu_rows_backward(const Swiglu &task, int64_t first, int64_t last) {
    const int64_t inner = task.inner;
    float a[CHUNK], b[CHUNK], c[CHUNK], d[CHUNK], e[CHUNK];
    for (int64_t row = first; row < last; row++)
        for (int64_t from = 0; from < inner; from += CHUNK) {
            const int64_t count = least(CHUNK, inner - from), at = row * task.gate_up_stride + from;
            const int64_t to = row * 2 * inner + from;
            const float *gate = floats(task.dtype, task.gate_up, at, count, a);
            const float *up = floats(task.dtype, task.gate_up, at + inner, count, b);
            const float *d_out = floats(task.dtype, task.d_out, row * task.d_out_stride + from, count, c);
            float *d_gate = room(task.dtype, task.out, to, count, d), *d_up = room(task.dtype, task.out, to + inner, count, e);
            for (int64_t i = 0; i < count; i += L) {
                const vf g = load<vf>(gate + i), d_o = load<vf>(d_out + i), s = sigmoid(g), silu = g * s;
                store(d_gate + i, d_o * load<vf>(up + i) * (s + silu - silu * s));
                store(d_up + i, d_o * silu);
            }
            put(task.dtype, task.out, to, count, d_gate);
            put(task.dtype, task.out, to + inner, count, d_up);
        }
}

} // namespace lk::LK_INNER
