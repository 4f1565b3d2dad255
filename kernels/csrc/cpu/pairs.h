// Few activations, rounded to bfloat16, that meet weights of bfloat16 in pairs of neighbours of K.
#pragma once

#include "activations.h"
#include "isa.h"
#include "vectors.h"

namespace {

#if defined(__AVX512BF16__)
void prepare_pairs(const lk::Source &source, int64_t width, int64_t first, int64_t last, const lk::Panel &panel) {
    for (int64_t row = first; row < last; row++) {
        const int64_t size = source.dtype == LK_FLOAT32 ? 4 : 2;
        const char *x = (const char *)source.x + row * source.stride * size;
        uint16_t *out = panel.halves + row * panel.stride;
        const Scaling scaling = scaling_of(source, x, width);
        float part[CHUNK] = {};
        for (int64_t from = 0; from < width; from += CHUNK) { // there is room for a whole one at the end
            const int64_t count = least(CHUNK, width - from);
            values_of(source, scaling, x, from, count, part);
            if (count < CHUNK) memset(part + count, 0, (size_t)(CHUNK - count) * sizeof(float));
            for (int64_t i = 0; i < CHUNK; i += 2 * L)
                store(out + from + i, _mm512_cvtne2ps_pbh((__m512)load<vf>(part + i + L), (__m512)load<vf>(part + i)));
        }
    }
}

struct Pairs {
    using Value = uint16_t;
    static constexpr int64_t STEP = 2 * L;
    static constexpr int64_t SIZE = 2;
    template <int M, int N>
    static INLINE void step(vf (&total)[M][N], const uint16_t *x, int64_t stride, const char *const (&w)[N]) {
        __m512bh wide[N];
        for (int n = 0; n < N; n++) wide[n] = load<__m512bh>(w[n]);
        for (int m = 0; m < M; m++) {
            const __m512bh v = load<__m512bh>(x + m * stride);
            for (int n = 0; n < N; n++) total[m][n] = (vf)_mm512_dpbf16_ps((__m512)total[m][n], v, wide[n]);
        }
    }
    // A run of the weight's values with each row's.
    template <int M>
    static INLINE void meet(vf (&total)[M], const uint16_t *x, int64_t stride, vu words) {
        for (int m = 0; m < M; m++)
            total[m] = (vf)_mm512_dpbf16_ps((__m512)total[m], load<__m512bh>(x + m * stride), (__m512bh)words);
    }
    static float of_row(const uint16_t *x, int64_t k) { return from_bf16(x[k]); }
};
#endif

} // namespace
