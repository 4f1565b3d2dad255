// Products of tiles by dot products of pairs: a vector holds a pair of neighbours of K of each of 16 activations, and meets
// the same pair of a feature in all lanes.
#pragma once

#include "isa.h"
#include "vectors.h"

namespace {

constexpr int64_t PIECE = 192, GROUP = 4 * SIDE, STREAMED_ROWS = 2 * SIDE;
constexpr bool HALVES = true; // of tiles are worth telling apart
constexpr int64_t TILE_ROWS = 8, CODED_TILE_ROWS = 16;

struct Tiles {};

INLINE vf dot(vf total, vf x, vf pair) { return (vf)_mm512_dpbf16_ps((__m512)total, (__m512bh)x, (__m512bh)pair); }
INLINE f8 dot(f8 total, f8 x, f8 pair) { return (f8)_mm256_dpbf16_ps((__m256)total, (__m256bh)x, (__m256bh)pair); }

// N features with R vectors of activations and, if there is a half, 8 more; as multiply_tiles.
template <int R, bool HALF, int N>
INLINE void dot_tiles(const char *w, int64_t row, int64_t width, const uint16_t *x, int64_t block, float *out, bool more,
                      int64_t ahead) {
    vf total[R + 1][N];
    f8 half[N];
    for (int n = 0; n < N; n++) {
        for (int r = 0; r < R; r++) total[r][n] = more ? load<vf>(out + (r * SIDE + n) * SIDE) : vf{};
        if (HALF) half[n] = more ? load<f8>(out + (R * SIDE + n) * SIDE) : f8{};
    }
    auto meet = [&](auto pair_of) { // x with a pair of each feature
        vf v[R + 1];
        for (int r = 0; r < R; r++) v[r] = load<vf>(x + r * block);
        const f8 rest = HALF ? load<f8>(x + R * block) : f8{};
        for (int n = 0; n < N; n++) {
            const __m512i pair = _mm512_set1_epi32(pair_of(w + n * row));
            for (int r = 0; r < R; r++) total[r][n] = dot(total[r][n], v[r], (vf)pair);
            if (HALF) half[n] = dot(half[n], rest, (f8)_mm512_castsi512_si256(pair));
        }
    };
    for (int64_t k = 0; k + 2 <= width; k += 2, w += 4, x += 2 * SIDE) {
        if (!(k % DEEP))
            for (int n = 0; n < N; n++) __builtin_prefetch(w + n * row + ahead);
        meet([](const char *at) { return load<int>(at); });
    }
    if (width % 2) meet([](const char *at) { return (int)load<uint16_t>(at); });
    for (int n = 0; n < N; n++) {
        for (int r = 0; r < R; r++) store(out + (r * SIDE + n) * SIDE, total[r][n]);
        if (HALF) store(out + (R * SIDE + n) * SIDE, extended(half[n]));
    }
}

// In a larger function GCC would keep a sum in memory; with many sums a call costs more than that.
template <int R, bool HALF, int N>
__attribute__((noinline)) void dot_tiles_alone(const char *w, int64_t row, int64_t width, const uint16_t *x, int64_t block,
                                               float *out, bool more, int64_t ahead) {
    dot_tiles<R, HALF, N>(w, row, width, x, block, out, more, ahead);
}

// Up to SIDE features with R tiles of activations, which lie `block` apart, over `width` values of K; out: (R, SIDE, SIDE),
// which is added to where there is more. near: the next features are neighbours, whose weights are asked for meanwhile;
// else those of the same features further on.
template <int R, bool SHORT>
INLINE void multiply_tiles(const char *w, int64_t row, int64_t width, int64_t features, const uint16_t *x, int64_t block,
                           float *out, bool more, bool near) {
    constexpr int FULL = R - SHORT, N = 2 * R - SHORT <= 6 ? 8 : 4; // sums, operands and one pair fill the registers
    constexpr auto some = R < 3 ? dot_tiles_alone<FULL, SHORT, N> : dot_tiles<FULL, SHORT, N>;
    if (features == SIDE)
        for (int n = 0; n < SIDE; n += N) some(w + n * row, row, width, x, block, out + n * SIDE, more, near ? N * row : 512);
    else
        for (int n = 0; n < features; n++)
            dot_tiles<FULL, SHORT, 1>(w + n * row, row, width, x, block, out + n * SIDE, more, 0);
}

} // namespace
