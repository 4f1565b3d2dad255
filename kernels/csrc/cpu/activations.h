// Norms of a row of activations on its way into a panel: RMSNorm, or LayerNorm where the source has a shift.
#pragma once

#include "isa.h"
#include "vectors.h"

namespace {

// Values below are nothing where they become integers: the inverse of their scale would have no number.
constexpr float SMALLEST = 1e-30f;

INLINE float largest_of(const float *x, int64_t count) {
    vf most = {};
    for (int64_t i = 0; i < count; i += L) most = larger(most, magnitude(load<vf>(x + i)));
    return largest(most);
}

// `run` values, each beside the one `apart` values further on, times `inverse` as bytes; their sum.
INLINE vf put_bytes(const float *x, int64_t apart, int64_t run, float inverse, int8_t *bytes) {
    vf added = {};
    for (int64_t i = 0; i < run; i += L, bytes += 2 * L) {
        const vf low = nearest(load<vf>(x + i) * inverse), high = nearest(load<vf>(x + apart + i) * inverse);
        added += low + high; // integers, small enough to be exact
        const vi words = (__builtin_convertvector(low, vi) & 255) | __builtin_convertvector(high, vi) << 8;
        store(bytes, __builtin_convertvector(words, vs));
    }
    return added;
}

constexpr int64_t CHUNK = 128; // values that are looked at together where a whole row is not at hand

// Sum of (x - mean)^power over a row, power 1 or 2, without a copy of a row of halves.
inline float summed(lk_dtype dtype, const void *x, int64_t width, float mean, int power) {
    vf total = {};
    auto add = [&](vf v) {
        const vf off = v - mean;
        total += power == 1 ? off : off * off;
    };
    int64_t done = 0;
    for (; dtype == LK_FLOAT32 && done + L <= width; done += L) add(load<vf>((const float *)x + done));
    float part[CHUNK];
    for (int64_t from = done; from < width; from += CHUNK) {
        const int64_t count = least(CHUNK, width - from);
        to_float(dtype, (const char *)x + from * (dtype == LK_FLOAT32 ? 4 : 2), part, count);
        for (int64_t i = count; i % L; i++) part[i] = mean;
        for (int64_t i = 0; i < count; i += L) add(load<vf>(part + i));
    }
    return sum(total);
}

struct Scaling {
    float mean = 0, factor = 1;
};

inline Scaling scaling_of(const lk::Source &source, const void *x, int64_t width) {
    if (!source.norm) return {};
    const float mean = source.shift ? summed(source.dtype, x, width, 0, 1) / (float)width : 0;
    return {mean, 1.f / __builtin_sqrtf(summed(source.dtype, x, width, mean, 2) / (float)width + source.eps)};
}

// `count` values of a row, which begin at `from`, in place.
inline void normalise(const lk::Source &source, Scaling scaling, int64_t from, int64_t count, float *x) {
    if (!source.norm) return;
    const float *weight = source.norm + from, *shift = source.shift ? source.shift + from : nullptr;
    int64_t i = 0;
    for (; i + L <= count; i += L) {
        const vf y = (load<vf>(x + i) - scaling.mean) * scaling.factor * load<vf>(weight + i);
        store(x + i, shift ? y + load<vf>(shift + i) : y);
    }
    for (; i < count; i++) x[i] = (x[i] - scaling.mean) * scaling.factor * weight[i] + (shift ? shift[i] : 0);
}

// `count` values of a row of activations x, which begin at `from`, as they go into a panel.
inline void values_of(const lk::Source &source, Scaling scaling, const void *x, int64_t from, int64_t count, float *out) {
    const float *own = (const float *)x + from;
    const int64_t size = source.dtype == LK_FLOAT32 ? 4 : 2;
    int64_t i = 0;
    if (source.dtype == LK_FLOAT32 && !source.norm)
        for (; i + L <= count; i += L) store(out + i, load<vf>(own + i));
    else if (source.dtype == LK_FLOAT32 && !source.shift)
        for (; i + L <= count; i += L) store(out + i, load<vf>(own + i) * scaling.factor * load<vf>(source.norm + from + i));
    if (i == count) return;
    to_float(source.dtype, (const char *)x + (from + i) * size, out + i, count - i);
    normalise(source, scaling, from + i, count - i, out + i);
}

} // namespace
