// Products in squares of as many features by activations as a vector has lanes, 16 or 8: which features of a weight meet the
// activations when, and where what comes of them belongs. What multiplies is a function
//     multiply(n, apart, features, from, to, found)
// that leaves in found (R, SIDE, SIDE) the products over values from..to - 1 of K of up to SIDE features n, n + apart, ...,
// added to what is there where `from` is not 0.
#pragma once

#include "vectors.h"

namespace {

constexpr int64_t SIDE = L; // rows and columns of a square

#if LK_LANES == 16
INLINE vf load_first(int64_t count, const float *from) {
    return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
}
INLINE void store_first(int64_t count, float *to, vf v) { _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)v); }

// Element i of vector j becomes element j of vector i.
INLINE void transpose(vf (&v)[SIDE]) {
    vf w[SIDE];
    for (int i = 0; i < SIDE; i += 2) { // pairs of neighbours, then of pairs, within quarters of a vector
        w[i] = __builtin_shufflevector(v[i], v[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
        w[i + 1] = __builtin_shufflevector(v[i], v[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    }
    for (int i = 0; i < SIDE; i += 4)
        for (int j = 0; j < 2; j++) {
            const vf a = w[i + j], b = w[i + j + 2];
            v[i + 2 * j] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
            v[i + 2 * j + 1] = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
        }
    for (int i = 0; i < 4; i++)
        for (int half = 0; half < SIDE; half += 8) {
            const vf a = v[half + i], b = v[half + i + 4];
            w[half + i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
            w[half + i + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
        }
    for (int i = 0; i < 8; i++) {
        v[i] = __builtin_shufflevector(w[i], w[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        v[i + 8] = __builtin_shufflevector(w[i], w[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
}

#elif LK_LANES == 8
constexpr vi LANE = {0, 1, 2, 3, 4, 5, 6, 7};
INLINE vf load_first(int64_t count, const float *from) {
    return (vf)_mm256_maskload_ps(from, (__m256i)(LANE < (int)count));
}
INLINE void store_first(int64_t count, float *to, vf v) {
    if (count == SIDE) return store(to, v); // in one instruction, where with a mask AMD takes many
    _mm256_maskstore_ps(to, (__m256i)(LANE < (int)count), (__m256)v);
}

// Element i of vector j becomes element j of vector i.
INLINE void transpose(vf (&v)[SIDE]) {
    vf w[SIDE];
    for (int i = 0; i < SIDE; i += 2) { // pairs of neighbours, then of pairs, within halves of a vector
        w[i] = __builtin_shufflevector(v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        w[i + 1] = __builtin_shufflevector(v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < SIDE; i += 4)
        for (int j = 0; j < 2; j++) {
            const vf a = w[i + j], b = w[i + j + 2];
            v[i + 2 * j] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
            v[i + 2 * j + 1] = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        const vf a = v[i], b = v[i + 4];
        v[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
        v[i + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    }
}
#endif

#if LK_LANES >= 8
// A square (features, activations), times the features' scales if there are any, to where it belongs: (activations, features).
INLINE void put_square(const float *square, int64_t apart, const float *scale, float *out, int64_t stride, int64_t rows,
                       int64_t features, bool add) {
    vf v[SIDE];
    for (int64_t i = 0; i < SIDE; i++) v[i] = load<vf>(square + i * apart);
    transpose(v);
    const vf factor = scale ? load_first(features, scale) : all(1.f);
    for (int64_t m = 0; m < SIDE; m++) {
        if (m == rows) return;
        float *to = out + m * stride;
        store_first(features, to, v[m] * factor + (add ? load_first(features, to) : vf{}));
    }
}

// The first SIDE * run features: SIDE that lie `run` apart meet the activations at a time, then their neighbours. Each is the
// head of a stream of rows that the processor sees ahead in; a square of neighbours would have streams as short as a row.
template <int R, class F>
INLINE void in_streams(F &&multiply, int64_t run, int64_t depth, int64_t rows, const float *scale, float *out,
                       int64_t stride, bool add) {
    alignas(64) float found[SIDE][R][SIDE][SIDE]; // (neighbours, rows' squares, streams, rows)
    for (int64_t first = 0; first < run; first += SIDE) {
        const int64_t some = least(SIDE, run - first);
        for (int64_t n = 0; n < some; n++) multiply(first + n, run, SIDE, 0, depth, found[n]);
        for (int64_t i = 0; i < SIDE; i++)
            for (int r = 0; r < R; r++)
                put_square(found[0][r][i], R * SIDE * SIDE, scale ? scale + i * run + first : nullptr,
                           out + i * run + first + r * SIDE * stride, stride, least(SIDE, rows - r * SIDE), some, add);
    }
}

// Features begin..end - 1, neighbours side by side: a piece of K of the activations stays in the first cache while GROUP
// features pass by. For many activations, to whom the weights are near after the first of them, or where what comes next is
// asked for in time.
template <int R, int64_t GROUP, class F>
INLINE void in_pieces(F &&multiply, int64_t begin, int64_t end, int64_t depth, int64_t piece, int64_t rows,
                      const float *scale, float *out, int64_t stride, bool add) {
    alignas(64) float found[GROUP / SIDE][R][SIDE][SIDE];
    for (int64_t first = begin; first < end; first += GROUP) {
        const int64_t last = least(first + GROUP, end);
        for (int64_t k = 0; k < depth; k += piece)
            for (int64_t n = first; n < last; n += SIDE)
                multiply(n, 1, least(SIDE, last - n), k, least(k + piece, depth), found[(n - first) / SIDE]);
        for (int64_t n = first; n < last; n += SIDE)
            for (int r = 0; r < R; r++)
                put_square(found[(n - first) / SIDE][r][0], SIDE, scale ? scale + n : nullptr, out + n + r * SIDE * stride,
                           stride, least(SIDE, rows - r * SIDE), least(SIDE, last - n), add);
    }
}
#endif

} // namespace
