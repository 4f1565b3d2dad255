// Norms of a row of activations on its way into a panel: RMSNorm, or LayerNorm where the source has a shift.
#pragma once

#include "isa.h"
#include "vectors.h"

namespace {

constexpr int64_t CHUNK = 128; // values that are looked at together where a whole row is not at hand

// Sum of (x - mean)^power over a row, power 1 or 2, without a copy of a row of halves.
inline float summed(lk_dtype dtype, const void *x, int64_t width, float mean, int power) {
    vf total = {};
    float part[CHUNK];
    for (int64_t from = 0; from < width; from += CHUNK) {
        const int64_t count = least(CHUNK, width - from);
        to_float(dtype, (const char *)x + from * (dtype == LK_FLOAT32 ? 4 : 2), part, count);
        for (int64_t i = count; i % L; i++) part[i] = mean;
        for (int64_t i = 0; i < count; i += L) {
            const vf off = load<vf>(part + i) - mean;
            total += power == 1 ? off : off * off;
        }
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

} // namespace
