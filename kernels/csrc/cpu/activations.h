// RMSNorm of a row of activations on its way into a panel.
#pragma once

#include "vectors.h"

namespace {

constexpr int64_t CHUNK = 128; // values that are looked at together where a whole row is not at hand

// 1 / the root of the mean square, without a copy of a row of halves.
inline float inverse_norm(lk_dtype dtype, const void *x, int64_t width, float eps) {
    vf total = {};
    float part[CHUNK];
    for (int64_t from = 0; from < width; from += CHUNK) {
        const int64_t count = least(CHUNK, width - from);
        to_float(dtype, (const char *)x + from * (dtype == LK_FLOAT32 ? 4 : 2), part, count);
        for (int64_t i = count; i % L; i++) part[i] = 0;
        for (int64_t i = 0; i < count; i += L) total += load<vf>(part + i) * load<vf>(part + i);
    }
    return 1.f / __builtin_sqrtf(sum(total) / (float)width + eps);
}

inline void scaled(const float *x, float factor, const float *weight, float *out, int64_t width) {
    int64_t i = 0;
    for (; i + L <= width; i += L) store(out + i, load<vf>(x + i) * factor * load<vf>(weight + i));
    for (; i < width; i++) out[i] = x[i] * factor * weight[i];
}

} // namespace
