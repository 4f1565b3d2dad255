// Products of small matrices of floats, and softmax of a block of scores, as attention needs them.
#pragma once

#include "vectors.h"

namespace {

constexpr int64_t PANEL = 2 * L; // columns of a product that are made at a time
constexpr int64_t DEPTH = 128;   // products that are summed at a time
constexpr float LOG2E = 1.44269504f;

// c (R, PANEL) (+)= a (R, depth) b (depth, PANEL): all sums stay in registers, and what was in c is added last, so that
// rounding grows with the blocks and not with all that is summed.
template <int R>
INLINE void tile(int64_t depth, const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_stride, float *c,
                 int64_t c_stride, bool add) {
    vf low[R] = {}, high[R] = {};
    for (int64_t k = 0; k < depth; k++) {
        const vf one = load<vf>(b + k * b_stride), two = load<vf>(b + k * b_stride + L);
        for (int r = 0; r < R; r++) {
            const float x = a[r * a_row + k * a_step];
            low[r] += one * x, high[r] += two * x;
        }
    }
    for (int r = 0; r < R; r++) {
        float *to = c + r * c_stride;
        store(to, add ? low[r] + load<vf>(to) : low[r]);
        store(to + L, add ? high[r] + load<vf>(to + L) : high[r]);
    }
}

// A matrix whose element (i, j) lies at data[i * row + j * step].
struct Matrix {
    const float *data;
    int64_t row, step;
};

// c (rows, columns) (+)= a (rows, depth) b (depth, columns); columns is a multiple of PANEL, and b's and c's lie side by side.
void product(int64_t rows, int64_t columns, int64_t depth, Matrix a, const float *b, int64_t b_stride, float *c,
             int64_t c_stride, bool add) {
    for (; depth > DEPTH; depth -= DEPTH, a.data += DEPTH * a.step, b += DEPTH * b_stride, add = true)
        product(rows, columns, DEPTH, a, b, b_stride, c, c_stride, add);
    for (int64_t n = 0; n < columns; n += PANEL) {
        int64_t m = 0;
        for (; m + 6 <= rows; m += 6)
            tile<6>(depth, a.data + m * a.row, a.row, a.step, b + n, b_stride, c + m * c_stride + n, c_stride, add);
        for (; m + 2 <= rows; m += 2)
            tile<2>(depth, a.data + m * a.row, a.row, a.step, b + n, b_stride, c + m * c_stride + n, c_stride, add);
        if (m < rows) tile<1>(depth, a.data + m * a.row, a.row, a.step, b + n, b_stride, c + m * c_stride + n, c_stride, add);
    }
}

// A row of a block of 64 scores becomes weights (Milakov and Gimelshein 2018): the first `seen` count, may be none or more
// than there are. `most` is the largest score so far and `total` the sum of weights; `out` is what has been weighed so far.
INLINE void weights(float *s, int64_t seen, float factor, float &most, float &total, float *out, int64_t width) {
    for (int64_t t = seen > 0 ? seen : 0; t < 64; t++) s[t] = -__builtin_inff();
    vf highest = all(most);
    for (int64_t t = 0; t < 64; t += L) {
        const vf score = load<vf>(s + t) * factor;
        store(s + t, score), highest = larger(highest, score);
    }
    const float now = largest(highest);
    vf added = {};
    for (int64_t t = 0; t < 64; t += L) {
        const vf e = power_of_two(load<vf>(s + t) - now);
        store(s + t, e), added += e;
    }
    if (now != most) {
        const float shrink = power_of_two(all(most - now))[0];
        total *= shrink, most = now;
        for (int64_t d = 0; d < width; d += L) store(out + d, load<vf>(out + d) * shrink);
    }
    total += sum(added);
}

// x (rows, columns), its rows x_stride apart -> out (columns, rows), its rows out_stride apart.
INLINE void turned(const float *x, int64_t x_stride, int64_t rows, int64_t columns, float *out, int64_t out_stride) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) {
        const float *from = x + i * x_stride;
        float *to = out + i;
        int64_t j = 0;
        for (; j + 4 <= columns; j += 4) {
            f4 v[4];
            for (int r = 0; r < 4; r++) v[r] = load<f4>(from + r * x_stride + j);
            const f4 ab = __builtin_shufflevector(v[0], v[1], 0, 4, 1, 5), cd = __builtin_shufflevector(v[2], v[3], 0, 4, 1, 5);
            const f4 AB = __builtin_shufflevector(v[0], v[1], 2, 6, 3, 7), CD = __builtin_shufflevector(v[2], v[3], 2, 6, 3, 7);
            store(to + j * out_stride, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
            store(to + (j + 1) * out_stride, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
            store(to + (j + 2) * out_stride, __builtin_shufflevector(AB, CD, 0, 1, 4, 5));
            store(to + (j + 3) * out_stride, __builtin_shufflevector(AB, CD, 2, 3, 6, 7));
        }
        for (; j < columns; j++)
            for (int r = 0; r < 4; r++) to[j * out_stride + r] = from[r * x_stride + j];
    }
    for (; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) out[j * out_stride + i] = x[i * x_stride + j];
}

} // namespace
