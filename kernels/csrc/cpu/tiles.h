// Weights of 16 bits and fewer that meet activations of bfloat16, in tiles: one of weights is 16 features of 32 neighbours of
// K, read where it lies; one of activations has them transposed, in pairs (IN_TILES). Of both comes a tile of 16 features by
// 16 activations, in float32: by AMX, or by the dot products of AVX-512-BF16.
#pragma once

#include "activations.h"
#include "isa.h"
#include "squares.h"
#include "vectors.h"
#include "weights.h"

namespace {
constexpr int64_t DEEP = 32; // values of K in a tile
} // namespace
#if defined(__AMX_BF16__)
#include "tiles_amx.h"
#elif defined(__AVX512BF16__)
#include "tiles_dot.h"
#endif

namespace {

#if defined(__AVX512BF16__)

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
                values_of(source, scaling[r], x + r * source.stride * size, from, count, part[r]);
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
}

template <int BITS, int R, bool SHORT>
void coded_tiles_of(const lk_weight &weight, const lk::Panel &panel, int64_t row, int64_t rows, int64_t first, int64_t count,
                    float *out, int64_t stride, bool add) {
    auto multiply = [&](int64_t n, int64_t apart, int64_t features, int64_t, int64_t, float (*found)[SIDE][SIDE]) {
        multiply_coded<BITS, R, SHORT>(weight, first + n, apart, features, panel, row, found);
    };
    const int64_t run = count / SIDE;
    in_streams<R>(multiply, run, panel.stride, rows, weight.scale + first, out, stride, add);
    in_pieces<R, SIDE>(multiply, run * SIDE, count, panel.stride, panel.stride, rows, weight.scale + first, out, stride, add);
}

// ---- all formats

template <int R, bool SHORT>
void tiles_of(const lk_weight &weight, const lk::Panel &panel, int64_t first_row, int64_t rows, int64_t first, int64_t count,
              float *out, int64_t stride, bool add) {
    if (weight.format == LK_WEIGHT_INT8)
        return coded_tiles_of<8, R, SHORT>(weight, panel, first_row, rows, first, count, out, stride, add);
    if (weight.format == LK_WEIGHT_INT4)
        return coded_tiles_of<4, R, SHORT>(weight, panel, first_row, rows, first, count, out, stride, add);
    const int64_t width = weight.in_features, row = (weight.row_stride ? weight.row_stride : width) * 2;
    const char *w = (const char *)weight.data + first * row;
    const uint16_t *x = panel.halves + first_row * panel.stride;
    auto multiply = [&](int64_t n, int64_t apart, int64_t features, int64_t from, int64_t to, float (*found)[SIDE][SIDE]) {
        multiply_tiles<R, SHORT>(w + n * row + 2 * from, apart * row, to - from, features, x + from * SIDE, SIDE * panel.stride,
                                 found[0][0], from > 0, apart == 1);
    };
    const int64_t run = panel.rows > STREAMED_ROWS ? 0 : count / SIDE;
    in_streams<R>(multiply, run, width, rows, nullptr, out, stride, add);
    in_pieces<R, GROUP>(multiply, run * SIDE, count, width, PIECE, rows, nullptr, out, stride, add);
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
