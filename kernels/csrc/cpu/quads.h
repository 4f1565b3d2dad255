// Weights of 8 and 4 bits that meet many activations rounded to 8 bits, by the integer products of AVX-512-VNNI or AVX-VNNI,
// those of 4 bits by AVX2's and AVX-512's too: a vector holds four values of K of each of 16 or 8 activations, and meets the
// same four codes of a feature in all lanes. Codes are multiplied as they lie: the activations' values are put in the order of
// the weight's bytes (IN_QUADS).
#pragma once

#include "activations.h"
#include "isa.h"
#include "squares.h"
#include "vectors.h"
#include "weights.h"

namespace {

// AMX multiplies more at a time, if as bfloat16.
#if defined(__AVX2__) && !defined(__AMX_BF16__)
#define LK_QUADS
#if defined(LK_VNNI)
constexpr bool VNNI = true;
constexpr int64_t QUAD_ROWS = L == 16 ? 6 : 5, HALF_QUAD_ROWS = L == 16 ? 8 : 5;
#else
constexpr bool VNNI = false;
constexpr int64_t QUAD_ROWS = lk::NEVER, HALF_QUAD_ROWS = L == 16 ? 8 : 21;
#endif
constexpr int64_t BLOCK = lk::QUAD_BLOCK;

// ---- activations

// BLOCK values, whose codes fill as many bits of a weight's memory, as bytes in the order of that: words of its 16 bits hold
// codes of two or four planes, `plane` values apart, of which the first and second byte's are neighbours here; of 4 bits the
// bytes' lower halves come first.
template <int BITS>
INLINE void encode_bytes(const float *x, int64_t plane, int8_t *bytes, float *scale, float *sum_of_codes) {
    constexpr int PLANES = 16 / BITS, RUN_OF = BLOCK / PLANES;
    vf most = {}, added = {};
    for (int p = 0; p < PLANES; p++)
        for (int64_t j = 0; j < RUN_OF; j += L) most = larger(most, magnitude(load<vf>(x + p * plane + j)));
    const float size = largest(most), inverse = size > SMALLEST ? 127.f / size : 0;
    for (int p = 0; p < PLANES / 2; p++, bytes += 2 * RUN_OF)
        added += put_bytes(x + p * plane, PLANES / 2 * plane, RUN_OF, inverse, bytes);
    *sum_of_codes = sum(added);
    *scale = size / 127.f + *sum_of_codes * 0.f; // a NaN stays one
}

template <int BITS>
void prepare_quads(const lk_weight &weight, const lk::Source &source, int64_t first, int64_t last, const lk::Panel &panel) {
    constexpr int64_t MOST = 256, PLANES = 16 / BITS;
    const int64_t width = weight.in_features, size = source.dtype == LK_FLOAT32 ? 4 : 2;
    const int64_t group = BITS == 4 ? weight.group_size : lk::QUANTUM;
    for (int64_t row = first; row < last; row += SIDE) {
        const int64_t rows = least(SIDE, last - row);
        const char *x = (const char *)source.x + row * source.stride * size;
        Scaling scaling[SIDE];
        for (int64_t r = 0; r < rows; r++) scaling[r] = scaling_of(source, x + r * source.stride * size, width);
        float part[SIDE][MOST] = {};
        for (int64_t from = 0; from < panel.stride; from += group) {
            const int64_t count = least(group, width - from);
            for (int64_t r = 0; r < rows; r++) {
                values_of(source, scaling[r], x + r * source.stride * size, from, count, part[r]);
                if (count < group) memset(part[r] + count, 0, (size_t)(group - count) * sizeof(float));
            }
            for (int64_t k = 0; k < group; k += BLOCK) {
                alignas(64) int8_t bytes[SIDE][BLOCK];
                float scale[SIDE], codes[SIDE];
                for (int64_t r = 0; r < SIDE; r++)
                    encode_bytes<BITS>(part[r] + k / PLANES, group / PLANES, bytes[r], scale + r, codes + r);
                const int64_t at = row * panel.groups + (from + k) / BLOCK * SIDE;
                const vf of_x = load<vf>(scale), total = load<vf>(codes);
                store(panel.scale + at, of_x);
                if (BITS == 8)
                    store(panel.excess + at, __builtin_convertvector(total * -128.f, vi)); // codes are 128 too large
                else
                    store(panel.total + at, total * of_x);
                for (int64_t word = 0; word < BLOCK / 4; word += SIDE) {
                    vf quads[SIDE];
                    for (int64_t r = 0; r < SIDE; r++) quads[r] = load<vf>(bytes[r] + 4 * word);
                    transpose(quads);
                    for (int64_t i = 0; i < SIDE; i++)
                        store(panel.bytes + row * panel.stride + (from + k + 4 * (word + i)) * SIDE, quads[i]);
                }
            }
        }
    }
}

// ---- products

#if LK_LANES == 16
INLINE vu four_codes(const uint8_t *w) { return (vu)_mm512_set1_epi32(load<int>(w)); }
#else
INLINE vu four_codes(const uint8_t *w) { return (vu)_mm256_set1_epi32(load<int>(w)); }
#endif

// N features, which lie `apart` bytes from each other, with R vectors of activations, `rows` bytes apart, over a block.
#if defined(LK_VNNI)
template <int BITS, int R, int N>
INLINE void meet_block(const uint8_t *w, int64_t apart, const int8_t *x, int64_t rows, vi (&total)[R][N]) {
    constexpr int64_t BYTES = BLOCK * BITS / 8; // bytes of a feature
    for (int64_t i = 0; i < BYTES; i += 4) {
        vi v[R], upper[R];
        for (int r = 0; r < R; r++) v[r] = load<vi>(x + i * SIDE + r * rows);
        for (int r = 0; r < R && BITS == 4; r++) upper[r] = load<vi>(x + (BYTES + i) * SIDE + r * rows);
        for (int n = 0; n < N; n++) {
            const vu codes = four_codes(w + n * apart + i);
            const vw lower = (vw)(BITS == 4 ? codes & 0x0f0f0f0fu : codes), higher = (vw)(codes >> 4 & 0x0f0f0f0fu);
            for (int r = 0; r < R; r++) total[r][n] = add_bytes(total[r][n], lower, (vw)v[r]);
            for (int r = 0; r < R && BITS == 4; r++) total[r][n] = add_bytes(total[r][n], higher, (vw)upper[r]);
        }
    }
}
#else
// Sums of eight pairs of products fit 16 bits: 8 * 2 * 15 * 127 < 2^15.
template <int BITS, int R, int N>
INLINE void meet_block(const uint8_t *w, int64_t apart, const int8_t *x, int64_t rows, vi (&total)[R][N]) {
    static_assert(BITS == 4);
    constexpr int64_t BYTES = BLOCK * BITS / 8, PART = BYTES / 2; // bytes of a feature
    for (int64_t part = 0; part < BYTES; part += PART) {
        vw sums[R][N] = {};
        for (int64_t i = part; i < part + PART; i += 4)
            for (int n = 0; n < N; n++) {
                const vu codes = four_codes(w + n * apart + i);
                const vw lower = (vw)(codes & 0x0f0f0f0fu), upper = (vw)(codes >> 4 & 0x0f0f0f0fu);
                for (int r = 0; r < R; r++) sums[r][n] = add_bytes(sums[r][n], lower, load<vw>(x + i * SIDE + r * rows));
                for (int r = 0; r < R; r++)
                    sums[r][n] = add_bytes(sums[r][n], upper, load<vw>(x + (BYTES + i) * SIDE + r * rows));
            }
        for (int r = 0; r < R; r++)
            for (int n = 0; n < N; n++) total[r][n] += added_up(sums[r][n]);
    }
}
#endif

// N features, `apart` from each other, with R times SIDE activations over values from..to - 1 of K; out: of R squares the
// rows of these features, which are added to where there is more.
template <int BITS, int R, int N>
__attribute__((noinline)) void meet(const lk_weight &weight, int64_t feature, int64_t apart, const lk::Panel &panel,
                                    int64_t row, int64_t from, int64_t to, float *out, int64_t ahead) {
    const int64_t bytes = panel.stride * BITS / 8, rows = SIDE * panel.stride, next = SIDE * panel.groups;
    const uint8_t *w = (const uint8_t *)weight.data + feature * bytes + from * BITS / 8;
    const int8_t *x = panel.bytes + row * panel.stride + from * SIDE;
    const float *of_x = panel.scale + row * panel.groups + from / BLOCK * SIDE;
    const float *sum_of_x = panel.total + row * panel.groups + from / BLOCK * SIDE; // or what makes up for 128
    constexpr bool KEPT = L == 16 && R < 3; // sums stay in registers, of which more rows leave none
    vf kept[R][N];
    auto sum_before = [&](int r, int n, int64_t k) { return k ? load<vf>(out + (r * SIDE + n) * SIDE) : vf{}; };
    for (int r = 0; r < R && KEPT; r++)
        for (int n = 0; n < N; n++) kept[r][n] = sum_before(r, n, from);
    for (int64_t k = from; k < to; k += BLOCK, w += BLOCK * BITS / 8, x += BLOCK * SIDE, of_x += SIDE, sum_of_x += SIDE) {
        for (int n = 0; n < N; n++) __builtin_prefetch(w + n * apart * bytes + ahead);
        vi total[R][N];
        for (int r = 0; r < R; r++)
            for (int n = 0; n < N; n++) total[r][n] = BITS == 8 ? load<vi>(sum_of_x + r * next) : vi{};
        meet_block<BITS, R, N>(w, apart * bytes, x, rows, total);
        float scale[N], offset[N];
        for (int n = 0; n < N && BITS == 4; n++) {
            const uint32_t pair = pair_of(weight, feature + n * apart, k / weight.group_size, panel.totals);
            scale[n] = from_bf16((uint16_t)(pair >> 16)), offset[n] = from_bf16((uint16_t)pair);
        }
        for (int r = 0; r < R; r++) {
            const vf factor = load<vf>(of_x + r * next), all_of_x = load<vf>(sum_of_x + r * next);
            for (int n = 0; n < N; n++) {
                vf sum = KEPT ? kept[r][n] : sum_before(r, n, k);
                if (BITS == 4) sum += all_of_x * offset[n];
                sum += __builtin_convertvector(total[r][n], vf) * (BITS == 4 ? factor * scale[n] : factor);
                if (KEPT) kept[r][n] = sum;
                else store(out + (r * SIDE + n) * SIDE, sum);
            }
        }
    }
    for (int r = 0; r < R && KEPT; r++)
        for (int n = 0; n < N; n++) store(out + (r * SIDE + n) * SIDE, kept[r][n]);
}

// As multiply_tiles. Sums and what they are made of fill the registers.
template <int BITS, int R>
INLINE void multiply_quads(const lk_weight &weight, int64_t feature, int64_t apart, int64_t features, const lk::Panel &panel,
                           int64_t row, int64_t from, int64_t to, float *out) {
    constexpr int N = R == 1 ? 8 : R == 2 && L == 16 ? 6 : R > 2 && L == 8 ? 2 : 4;
    constexpr int REST = SIDE % N ? SIDE % N : 1;
    const int64_t ahead = apart == 1 ? N * panel.stride * BITS / 8 : 512;
    auto some = [&](auto of_so_many, int n, int64_t distance) {
        of_so_many(weight, feature + n * apart, apart, panel, row, from, to, out + n * SIDE, distance);
    };
    int n = 0;
    for (; n + N <= features; n += N) some(meet<BITS, R, N>, n, ahead);
    if (REST > 1 && features - n == REST) return some(meet<BITS, R, REST>, n, ahead);
    for (; n < features; n++) some(meet<BITS, R, 1>, n, 0);
}

template <int BITS, int R>
void quads_of(const lk_weight &weight, const lk::Panel &panel, int64_t row, int64_t rows, int64_t first, int64_t count,
              float *out, int64_t stride, bool add) {
    constexpr int64_t GROUP = 4 * SIDE, STREAMED_ROWS = 2 * SIDE, PIECE = 384;
    auto multiply = [&](int64_t n, int64_t apart, int64_t features, int64_t from, int64_t to, float (*found)[SIDE][SIDE]) {
        multiply_quads<BITS, R>(weight, first + n, apart, features, panel, row, from, to, found[0][0]);
    };
    const int64_t run = panel.rows > STREAMED_ROWS ? 0 : count / SIDE;
    in_streams<R>(multiply, run, panel.stride, rows, weight.scale + first, out, stride, add);
    in_pieces<R, GROUP>(multiply, run * SIDE, count, panel.stride, PIECE, rows, weight.scale + first, out, stride, add);
}

constexpr int64_t SQUARES = L == 16 || !VNNI ? 4 : 2; // that weights meet at a time, as registers allow

template <int BITS, class... Rest>
void squares_of(int64_t squares, const Rest &...rest) {
    if (squares == 1) return quads_of<BITS, 1>(rest...);
    if (squares == 2) return quads_of<BITS, 2>(rest...);
    if constexpr (SQUARES == 4) return (squares == 3 ? quads_of<BITS, 3> : quads_of<BITS, 4>)(rest...);
}

void quad_products(const lk_weight &weight, const lk::Panel &panel, int64_t row, int64_t rows, int64_t first, int64_t count,
                   float *out, int64_t stride, bool add) {
    for (int64_t m = 0; m < rows; m += SQUARES * SIDE) {
        const int64_t some = least(SQUARES * SIDE, rows - m), squares = (some + SIDE - 1) / SIDE;
        float *to = out + m * stride;
        if (weight.format == LK_WEIGHT_INT4) squares_of<4>(squares, weight, panel, row + m, some, first, count, to, stride, add);
        else if constexpr (VNNI) squares_of<8>(squares, weight, panel, row + m, some, first, count, to, stride, add);
    }
}
#else
constexpr int64_t QUAD_ROWS = lk::NEVER, HALF_QUAD_ROWS = lk::NEVER;
#endif

} // namespace
