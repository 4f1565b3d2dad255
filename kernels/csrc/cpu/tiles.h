// Weights of 16 bits and fewer that meet activations of bfloat16, in tiles: one of weights is 16 features of 32 neighbours of
// K, read where it lies; one of activations has them transposed, in pairs (IN_TILES). Of both comes a tile of 16 features by
// 16 activations, in float32: by AMX, or by the dot products of AVX-512-BF16.
#pragma once

#include "activations.h"
#include "isa.h"
#include "vectors.h"
#include "weights.h"

namespace {
constexpr int64_t SIDE = 16, DEEP = 32; // rows and columns of a result; values of K in a tile
} // namespace
#if defined(__AMX_BF16__)
#include "tiles_amx.h"
#elif defined(__AVX512BF16__)
#include "tiles_dot.h"
#endif

namespace {

#if defined(__AVX512BF16__)

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

// ---- activations

// DEEP values of up to SIDE rows, one row behind the other, rounded and in pairs: (DEEP / 2, SIDE, 2).
INLINE void pair(const float *x, int64_t stride, uint16_t *out) {
    vf words[SIDE];
    for (int64_t r = 0; r < SIDE; r++)
        words[r] = (vf)_mm512_cvtne2ps_pbh((__m512)load<vf>(x + r * stride + L), (__m512)load<vf>(x + r * stride));
    transpose(words);
    for (int64_t i = 0; i < SIDE; i++) store(out + i * DEEP, words[i]);
}

// The sum of so many values as they are once rounded.
INLINE float rounded_sum(const float *x, int64_t count) {
    vf total = {};
    for (int64_t i = 0; i < count; i += L) {
        const __m256bh rounded = _mm512_cvtneps_pbh((__m512)load<vf>(x + i));
        total += load_bf16((const uint16_t *)&rounded);
    }
    return sum(total);
}

void prepare_tiles(const lk_weight &weight, const lk::Source &source, int64_t first, int64_t last, const lk::Panel &panel) {
    constexpr int64_t PIECE = 128; // of K; panels end with a half or a whole one
    const int64_t width = weight.in_features, size = source.dtype == LK_FLOAT32 ? 4 : 2, group = panel.stride / panel.groups;
    for (int64_t row = first; row < last; row += SIDE) {
        const int64_t rows = least(SIDE, last - row);
        const char *x = (const char *)source.x + row * source.stride * size;
        float *total = panel.total + row * panel.groups;
        Scaling scaling[SIDE];
        for (int64_t r = 0; r < rows; r++) scaling[r] = scaling_of(source, x + r * source.stride * size, width);
        if (weight.format == LK_WEIGHT_INT4) memset(total, 0, (size_t)(panel.groups * SIDE) * sizeof(float));
        float part[SIDE][PIECE] = {};
        for (int64_t from = 0; from < panel.stride; from += PIECE) {
            const int64_t count = from < width ? least(PIECE, width - from) : 0, end = least(PIECE, panel.stride - from);
            for (int64_t r = 0; r < rows; r++) {
                to_float(source.dtype, x + (r * source.stride + from) * size, part[r], count);
                normalise(source, scaling[r], from, count, part[r]);
                if (count < PIECE) memset(part[r] + count, 0, (size_t)(PIECE - count) * sizeof(float));
                for (int64_t k = 0; weight.format == LK_WEIGHT_INT4 && k < end; k += 64)
                    total[(from + k) / group * SIDE + r] += rounded_sum(part[r] + k, 64);
            }
            for (int64_t k = 0; k < end; k += DEEP)
                pair(&part[0][k], PIECE, panel.halves + row * panel.stride + (from + k) * SIDE);
        }
    }
}

// ---- products; SHORT: the last tile of activations has at most SIDE / 2 of them

// A tile of results, (features, activations), to where it belongs: (activations, features).
INLINE void put_tile(const float *tile, int64_t apart, float *out, int64_t stride, int64_t rows, int64_t features, bool add) {
    vf v[SIDE];
    for (int64_t i = 0; i < SIDE; i++) v[i] = load<vf>(tile + i * apart);
    transpose(v);
    const __mmask16 there = (__mmask16)((1u << features) - 1);
    for (int64_t m = 0; m < SIDE; m++) {
        if (m == rows) return;
        float *to = out + m * stride;
        const __m512 sum = add ? _mm512_add_ps(_mm512_maskz_loadu_ps(there, to), (__m512)v[m]) : (__m512)v[m];
        _mm512_mask_storeu_ps(to, there, sum);
    }
}

// SIDE features that lie `run` apart meet the activations at a time, then their neighbours: each is the head of a stream
// of rows that the processor sees ahead in. A tile of neighbours would have streams as short as a row.
template <int R, bool SHORT>
void streams_of(const char *w, int64_t row, int64_t width, int64_t run, const uint16_t *x, int64_t block, int64_t rows,
                float *out, int64_t stride, bool add) {
    alignas(64) float found[SIDE][R][SIDE][SIDE]; // (neighbours, rows' tiles, streams, rows)
    for (int64_t first = 0; first < run; first += SIDE) {
        const int64_t some = least(SIDE, run - first);
        for (int64_t n = 0; n < some; n++)
            multiply_tiles<R, SHORT>(w + (first + n) * row, run * row, width, SIDE, x, block, found[n][0][0], false, false);
        for (int64_t i = 0; i < SIDE; i++)
            for (int r = 0; r < R; r++)
                put_tile(found[0][r][i], R * SIDE * SIDE, out + i * run + first + r * SIDE * stride, stride,
                         least(SIDE, rows - r * SIDE), some, add);
    }
}

// Neighbours side by side: a piece of K of the activations stays in the first cache while a group of features passes by. For
// many activations, to whom the weights are near after the first of them, or where what comes next is asked for in time.
template <int R, bool SHORT>
void pieces_of(const char *w, int64_t row, int64_t width, int64_t count, const uint16_t *x, int64_t block, int64_t rows,
               float *out, int64_t stride, bool add) {
    alignas(64) float found[GROUP / SIDE][R][SIDE][SIDE];
    for (int64_t first = 0; first < count; first += GROUP) {
        const int64_t end = least(first + GROUP, count);
        for (int64_t k = 0; k < width; k += PIECE)
            for (int64_t n = first; n < end; n += SIDE)
                multiply_tiles<R, SHORT>(w + n * row + 2 * k, row, least(PIECE, width - k), least(SIDE, end - n), x + k * SIDE,
                                         block, found[(n - first) / SIDE][0][0], k > 0, true);
        for (int64_t n = first; n < end; n += SIDE)
            for (int r = 0; r < R; r++)
                put_tile(found[(n - first) / SIDE][r][0], SIDE, out + n + r * SIDE * stride, stride,
                         least(SIDE, rows - r * SIDE), least(SIDE, end - n), add);
    }
}

// ---- weights of 8 and 4 bits, as integers that bfloat16 holds exactly; scales come afterwards

// Words of 16 bits hold as many codes in each of their planes, `plane` values of K apart; nothing is rounded.
template <int BITS>
INLINE void decode(const uint8_t *w, int64_t count, int64_t plane, uint16_t *out) {
    if constexpr (BITS == 4) {
        alignas(32) static const uint16_t VALUE[16] = {0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100,
                                                       0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
        const __m256i values = load<__m256i>(VALUE);
        for (int64_t from = 0; from < count; from += 4 * plane, w += 2 * plane) {
            for (int64_t j = 0; j < plane; j += 16)
                for (int p = 0; p < 4; p++) // of the index the lowest four bits count
                    store(out + from + p * plane + j,
                          _mm256_permutexvar_epi16(_mm256_srli_epi16(load<__m256i>(w + 2 * j), 4 * p), values));
        }
    } else {
        for (int64_t from = 0; from < count; from += 2 * plane, w += 2 * plane) // planes are 64 long
            for (int64_t j = 0; j < plane; j += 32) {
                const vi low = __builtin_convertvector(load<vh>(w + 2 * j), vi);
                const vi high = __builtin_convertvector(load<vh>(w + 2 * j + 32), vi);
                auto put = [&](int64_t at, vi a, vi b) {
                    store(out + at, _mm512_cvtne2ps_pbh((__m512)__builtin_convertvector(b - 128, vf),
                                                        (__m512)__builtin_convertvector(a - 128, vf)));
                };
                put(from + j, low & 255, high & 255);
                put(from + plane + j, low >> 8, high >> 8);
            }
    }
}

// Up to SIDE features, `apart` from each other, with R tiles of activations, over all of K.
template <int BITS, int R, bool SHORT>
void multiply_coded(const lk_weight &weight, int64_t first, int64_t apart, int64_t features, const lk::Panel &panel,
                    int64_t row, float (*sum)[SIDE][SIDE]) {
    constexpr int64_t MOST = 256;
    const int64_t group = panel.stride / panel.groups, bytes = panel.stride * BITS / 8, plane = group * BITS / 16;
    const int64_t step = BITS == 4 ? group : MOST, block = SIDE * panel.stride;
    const uint8_t *w = (const uint8_t *)weight.data + first * bytes;
    const uint16_t *x = panel.halves + row * panel.stride;
    alignas(64) uint16_t codes[SIDE][MOST] = {};
    alignas(64) float part[R][SIDE][SIDE];
    for (int64_t k = 0; k < panel.stride; k += step) {
        const int64_t count = least(step, panel.stride - k);
        for (int64_t i = 0; i < features; i++) decode<BITS>(w + i * apart * bytes + k * BITS / 8, count, plane, codes[i]);
        multiply_tiles<R, SHORT>((const char *)codes, 2 * MOST, count, SIDE, x + k * SIDE, block,
                                 BITS == 4 ? part[0][0] : sum[0][0], BITS == 8 && k > 0, true);
        for (int64_t i = 0; BITS == 4 && i < features; i++) {
            const uint32_t pair = pair_of(weight, first + i * apart, k / group, panel.totals);
            const float scale = from_bf16((uint16_t)(pair >> 16)), offset = from_bf16((uint16_t)pair);
            for (int r = 0; r < R; r++) {
                const float *total = panel.total + (row + r * SIDE) * panel.groups + k / group * SIDE;
                const vf one = load<vf>(part[r][i]) * scale + load<vf>(total) * offset;
                store(sum[r][i], k ? load<vf>(sum[r][i]) + one : one);
            }
        }
    }
    for (int64_t i = 0; i < features; i++)
        for (int r = 0; r < R; r++) store(sum[r][i], load<vf>(sum[r][i]) * weight.scale[first + i * apart]);
}

template <int BITS, int R, bool SHORT>
void coded_streams(const lk_weight &weight, const lk::Panel &panel, int64_t row, int64_t rows, int64_t first, int64_t count,
                   float *out, int64_t stride, bool add) {
    alignas(64) float found[SIDE][R][SIDE][SIDE]; // as in streams_of
    const int64_t run = count / SIDE;
    for (int64_t begin = 0; begin < run; begin += SIDE) {
        const int64_t some = least(SIDE, run - begin);
        for (int64_t n = 0; n < some; n++)
            multiply_coded<BITS, R, SHORT>(weight, first + begin + n, run, SIDE, panel, row, found[n]);
        for (int64_t i = 0; i < SIDE; i++)
            for (int r = 0; r < R; r++)
                put_tile(found[0][r][i], R * SIDE * SIDE, out + i * run + begin + r * SIDE * stride, stride,
                         least(SIDE, rows - r * SIDE), some, add);
    }
    const int64_t done = run * SIDE;
    if (done == count) return;
    multiply_coded<BITS, R, SHORT>(weight, first + done, 1, count - done, panel, row, found[0]);
    for (int r = 0; r < R; r++)
        put_tile(found[0][r][0], SIDE, out + done + r * SIDE * stride, stride, least(SIDE, rows - r * SIDE), count - done, add);
}

// ---- all formats

template <int R, bool SHORT>
void tiles_of(const lk_weight &weight, const lk::Panel &panel, int64_t first_row, int64_t rows, int64_t first, int64_t count,
              float *out, int64_t stride, bool add) {
    if (weight.format == LK_WEIGHT_INT8)
        return coded_streams<8, R, SHORT>(weight, panel, first_row, rows, first, count, out, stride, add);
    if (weight.format == LK_WEIGHT_INT4)
        return coded_streams<4, R, SHORT>(weight, panel, first_row, rows, first, count, out, stride, add);
    const int64_t width = weight.in_features, row = (weight.row_stride ? weight.row_stride : width) * 2;
    const int64_t run = panel.rows > STREAMED_ROWS ? 0 : count / SIDE, done = run * SIDE, block = SIDE * panel.stride;
    const char *w = (const char *)weight.data + first * row;
    const uint16_t *x = panel.halves + first_row * panel.stride;
    if (run) streams_of<R, SHORT>(w, row, width, run, x, block, rows, out, stride, add);
    if (done < count) pieces_of<R, SHORT>(w + done * row, row, width, count - done, x, block, rows, out + done, stride, add);
}

void tile_products(const lk_weight &weight, const lk::Panel &panel, int64_t first_row, int64_t rows, int64_t first,
                   int64_t count, float *out, int64_t out_stride, bool add) {
    static_assert(lk::ROW_BLOCK == 4 * SIDE);
    constexpr decltype(&tiles_of<1, false>) OF[] = {tiles_of<1, HALVES>, tiles_of<1, false>, tiles_of<2, HALVES>,
                                                    tiles_of<2, false>, tiles_of<3, HALVES>, tiles_of<3, false>,
                                                    tiles_of<4, HALVES>, tiles_of<4, false>};
    [[maybe_unused]] const Tiles tiles;
    OF[2 * (rows - 1) / SIDE](weight, panel, first_row, rows, first, count, out, out_stride, add);
}
#else
constexpr int64_t TILE_ROWS = lk::NEVER, CODED_TILE_ROWS = lk::NEVER;
#endif

} // namespace
