// Weights of 8 and 4 bits, in the layout of quantized_linear.py, that meet activations as integers of 16 bits; those of 4
// bits also as such of 8 (IN_BYTES, a few rows), and one row of 16 bits as two bytes a value (IN_HALVES). Sums are integers
// throughout a group.
#pragma once

#include <type_traits>

#include "activations.h"
#include "isa.h"
#include "vectors.h"
#include "weights.h"

namespace {

using lk::Panel;

// ---- activations

// Words of a weight of 8 or 4 bits that are looked at together: as many as a vector has, if its planes are so long.
constexpr int64_t words_of(int64_t plane) { return L == 16 && plane % 32 == 0 ? 32 : 16; }

constexpr float MOST_OF_16 = 127 * 256 + 127; // of a value's 16 bits: the upper 8, rounded, are no more than 127

// A group of values as integers of 16 bits, in the order in which the weight's words have their codes: what meets some
// words, `planes` runs of neighbours, lies together.
void encode(const float *x, int64_t count, int64_t planes, int16_t *codes, float *scale, float *total) {
    vf added = {};
    const float size = largest_of(x, count), inverse = size > SMALLEST ? MOST_OF_16 / size : 0;
    const int64_t plane = count / planes, words = words_of(plane);
    for (int64_t j = 0; j < plane; j += words)
        for (int64_t p = 0; p < planes; p++, codes += words)
            for (int64_t i = 0; i < words; i += L) {
                const vf whole = nearest(load<vf>(x + p * plane + j + i) * inverse);
                added += whole; // integers, small enough to be exact
                store(codes + i, __builtin_convertvector(__builtin_convertvector(whole, vi), vs));
            }
    *scale = size / MOST_OF_16;
    *total = sum(added) * *scale;
}

#if defined(__AVX2__)
constexpr bool TAKES_BYTES = true;

// What encode makes for a weight of 4 bits, as 256 times a byte plus a byte (two's complement both) in the order of the
// weight's bytes: of those that meet some words first what meets the lower halves of their bytes, its upper bytes first.
void encode_in_halves(const float *x, int64_t count, int8_t *bytes, float *scale, float *total) {
    const float size = largest_of(x, count), inverse = size > SMALLEST ? MOST_OF_16 / size : 0;
    const int64_t plane = count / 4, words = words_of(plane);
    vf added = {};
    for (int64_t j = 0; j < plane; j += words)
        for (int64_t p = 0; p < 2; p++, bytes += 4 * words)
            for (int64_t i = 0; i < words; i += L) {
                const float *from = x + p * plane + j + i;
                const vf even = nearest(load<vf>(from) * inverse), odd = nearest(load<vf>(from + 2 * plane) * inverse);
                added += even + odd; // integers, small enough to be exact
                const vi a = __builtin_convertvector(even, vi), b = __builtin_convertvector(odd, vi);
                const vi upper = ((a + 128) >> 8 & 255) | ((b + 128) & ~255), lower = (a & 255) | b << 8;
                store(bytes + 2 * i, __builtin_convertvector(upper, vs));
                store(bytes + 2 * (words + i), __builtin_convertvector(lower, vs));
            }
    *scale = size / MOST_OF_16;
    *total = sum(added) * *scale;
}

// The same as integers of 8 bits, in the order of the weight's bytes: of those that meet some words first what meets the
// lower halves of their bytes.
void encode_in_bytes(const float *x, int64_t count, int8_t *bytes, float *scale, float *total) {
    const float size = largest_of(x, count), inverse = size > SMALLEST ? 127.f / size : 0;
    const int64_t plane = count / 4, words = words_of(plane);
    vf added = {};
    for (int64_t j = 0; j < plane; j += words)
        for (int64_t p = 0; p < 2; p++, bytes += 2 * words)
            added += put_bytes(x + p * plane + j, 2 * plane, words, inverse, bytes);
    const float codes = sum(added);
    *scale = size / 127.f + codes * 0.f; // a NaN stays one
    *total = codes * *scale;
}
#else
constexpr bool TAKES_BYTES = false;
#endif

// ---- products

struct Halves { // of 16 bits: IN_HALVES
    int8_t of_some[2];
};

typedef uint32_t u8 __attribute__((vector_size(32)));

template <int WORDS>
struct Wide {
    using Words = h16;
    using Sums = i8;
    using Floats = f8;
#if defined(__AVX2__)
    using ByteSums = ByteSums16;
#endif
    static INLINE f8 halved(f8 x) { return x; }
    static INLINE f8 widened(f8 x) { return x; }
};
#if LK_LANES == 16
template <>
struct Wide<32> {
    using Words = h32;
    using Sums = i16;
    using Floats = vf;
    using ByteSums = ByteSums32;
    static INLINE f8 halved(vf x) {
        return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    }
    static INLINE vf widened(f8 x) { return extended(x); }
};
#endif

// STEPS vectors of words of each of N features, `next` bytes from one to the other, with M rows of x, `stride` codes apart.
template <int BITS, int WORDS, int STEPS, int M, int N>
INLINE void meet_words(const uint8_t *w, int64_t next, const int16_t *x, int64_t stride,
                       typename Wide<WORDS>::Sums (&total)[M][N]) {
    using Words = typename Wide<WORDS>::Words;
    constexpr int PLANES = 16 / BITS;
    for (int step = 0; step < STEPS; step++, w += 2 * WORDS, x += WORDS * PLANES) {
        Words words[N], codes[N];
        for (int i = 0; i < N; i++) words[i] = load<Words>(w + i * next);
        for (int p = 0; p < PLANES; p++) {
            for (int i = 0; i < N; i++) {
                codes[i] = words[i] >> (BITS * p);
                if (p < PLANES - 1) codes[i] &= (uint16_t)((1 << BITS) - 1);
            }
            for (int m = 0; m < M; m++) {
                const Words values = load<Words>(x + m * stride + WORDS * p);
                for (int i = 0; i < N; i++) total[m][i] = multiply_add(total[m][i], codes[i], values);
            }
        }
    }
}

#if defined(__AVX2__)
// The same with x of 8 bits and a weight of 4. Sums of a group's pairs of products fit 16 bits: 8 * 2 * 15 * 127 < 2^15.
template <int WORDS, int STEPS, int M, int N>
INLINE void meet_bytes(const uint8_t *w, int64_t next, const int8_t *x, int64_t stride,
                       typename Wide<WORDS>::Sums (&total)[M][N]) {
    using Words = typename Wide<WORDS>::Words;
    typename Wide<WORDS>::ByteSums sums[M][N] = {};
    for (int step = 0; step < STEPS; step++, w += 2 * WORDS, x += 4 * WORDS) {
        for (int i = 0; i < N; i++) {
            Words words = load<Words>(w + i * next);
            asm("" : "+v"(words)); // or each half would load it, and loads are what a core has fewest of
            for (int half = 0; half < 2; half++) {
                const Words codes = words >> 4 * half & (uint16_t)0x0f0f;
                for (int m = 0; m < M; m++)
                    sums[m][i] = add_bytes(sums[m][i], codes, load<Words>(x + m * stride + 2 * WORDS * half));
            }
        }
    }
    for (int m = 0; m < M; m++)
        for (int i = 0; i < N; i++) total[m][i] = added_up(sums[m][i]);
}

// The same with one row of x as halves and a weight of 4 bits. Sums fit 16 bits: 8 * 2 * 15 * 128 < 2^15. Three quarters of the
// instructions of meet_words. One feature after the other: sums of several would fill the registers.
template <int WORDS, int STEPS, int N>
INLINE void meet_halves(const uint8_t *w, int64_t next, const int8_t *x, typename Wide<WORDS>::Sums (&total)[1][N]) {
    using Words = typename Wide<WORDS>::Words;
    for (int i = 0; i < N; i++) {
        typename Wide<WORDS>::ByteSums upper = {}, lower = {};
        for (int step = 0; step < STEPS; step++) {
            Words words = load<Words>(w + i * next + 2 * WORDS * step);
            asm("" : "+v"(words)); // as above
            for (int half = 0; half < 2; half++) {
                const Words codes = words >> 4 * half & (uint16_t)0x0f0f;
                const int8_t *values = x + 4 * WORDS * (2 * step + half);
                upper = add_bytes(upper, codes, load<Words>(values));
                lower = add_bytes(lower, codes, load<Words>(values + 2 * WORDS));
            }
        }
        total[0][i] = joined(upper, lower);
    }
}
#endif

// Bytes of a run of the weight that are asked for before they are met: into the first cache.
constexpr int64_t CODES_AHEAD = L == 16 ? 256 : 512;

// Rows of the weight that stay in the second cache while tiles of x pass by.
constexpr int64_t NEAR = 64;

INLINE void put_scaled(const float *found, float excess, const float *scale, int64_t count, float *out, bool add) {
    int64_t i = 0;
    for (; i + L <= count; i += L) {
        const vf y = (load<vf>(found + i) - excess) * load<vf>(scale + i);
        store(out + i, add ? load<vf>(out + i) + y : y);
    }
    for (; i < count; i++) {
        const float y = (found[i] - excess) * scale[i];
        out[i] = add ? out[i] + y : y;
    }
}

// M rows of x and N of the weight's, which lie `apart` rows from each other, and `count` times so, up to NEAR, each one row
// further on. Words of 16 bits hold as many codes in each of their planes, which meet as many neighbours of x. SIZE values
// of K are a group's. pairs: as lk_weight.group_pairs, from row n on.
template <class Code, int BITS, int WORDS, int SIZE, int M, int N>
__attribute__((noinline)) // one large function would have too few registers for the inner loops
void coded_tiles(const lk_weight &weight, const uint32_t *pairs, int64_t n, int64_t apart, int64_t count, const Panel &panel,
                 int64_t row, float *out, int64_t out_stride, bool add) {
    using Sums = typename Wide<WORDS>::Sums;
    using Floats = typename Wide<WORDS>::Floats;
    constexpr int STEPS = SIZE * BITS / (16 * WORDS);
    const int64_t bytes = panel.stride * BITS / 8, next = apart * bytes, next_pairs = apart * panel.totals;
    const uint8_t *w = (const uint8_t *)weight.data + n * bytes;
    const float *own = panel.scale + row * panel.totals, *total_of_x = panel.total + row * panel.totals;
    float found[M * N][NEAR];
    for (int64_t done = 0; done < count; done++, pairs += BITS == 4 ? panel.totals : 0) {
        const Code *x = (const Code *)panel.codes + row * panel.stride;
        for (int i = 0; BITS == 4 && i < N; i++) __builtin_prefetch(pairs + i * next_pairs + 64);
        Floats real[M][N] = {};
        float factor[M][N][lk::PAIRS];
        for (int64_t from = 0, end; from < panel.groups; from = end) {
            end = BITS == 4 ? least(from + lk::PAIRS, panel.groups) : panel.groups;
            for (int i = 0; BITS == 4 && i < N; i++) {
                const u8 eight = load<u8>(pairs + i * next_pairs + from);
                const f8 scales = (f8)(eight & 0xffff0000u), offsets = (f8)(eight << 16);
                for (int m = 0; m < M; m++) {
                    store(factor[m][i], scales * load<f8>(own + m * panel.totals + from));
                    real[m][i] += Wide<WORDS>::widened(offsets * load<f8>(total_of_x + m * panel.totals + from));
                }
            }
            for (int64_t g = from; g < end; g++, w += SIZE * BITS / 8, x += SIZE) {
                for (int i = 0; BITS == 4 && i < N; i++)
                    for (int64_t line = 0; line < SIZE / 2; line += 64) __builtin_prefetch(w + i * next + CODES_AHEAD + line);
                Sums total[M][N] = {};
                if constexpr (std::is_same_v<Code, Halves>)
                    meet_halves<WORDS, STEPS, N>(w, next, (const int8_t *)x, total);
                else if constexpr (sizeof(Code) == 1)
                    meet_bytes<WORDS, STEPS, M, N>(w, next, x, panel.stride, total);
                else
                    meet_words<BITS, WORDS, STEPS, M, N>(w, next, x, panel.stride, total);
                for (int m = 0; m < M; m++)
                    for (int i = 0; i < N; i++)
                        real[m][i] += __builtin_convertvector(total[m][i], Floats) *
                                      (BITS == 4 ? factor[m][i][g - from] : own[m * panel.totals + g]);
            }
        }
        f4 parts[(M * N + 3) / 4 * 4] = {};
        for (int j = 0; j < M * N; j++) {
            const f8 eight = Wide<WORDS>::halved(real[j / N][j % N]);
            parts[j] = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
        }
        for (int j = 0; j < M * N; j += 4) {
            const f4 four = sums(parts[j], parts[j + 1], parts[j + 2], parts[j + 3]);
            for (int k = 0; k < 4 && j + k < M * N; k++) found[j + k][done] = four[k];
        }
    }
    for (int m = 0; m < M; m++) {
        const float excess = BITS == 8 ? 128 * total_of_x[m * panel.totals] : 0; // codes are 128 too large
        for (int i = 0; i < N; i++)
            put_scaled(found[m * N + i], excess, weight.scale + n + i * apart, count, out + m * out_stride + i * apart, add);
    }
}

// Asks for the first bytes of runs that are read side by side: the processor does not see ahead in them yet.
INLINE void ask_for_starts(const void *first, int64_t runs, int64_t apart, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += 64)
        for (int64_t i = 0; i < runs; i++) __builtin_prefetch((const char *)first + i * apart + line);
}

template <class Code, int BITS, int WORDS, int SIZE>
void coded_products(const lk_weight &weight, const uint32_t *pairs, const Panel &panel, int64_t row, int64_t rows,
                    int64_t first, int64_t count, float *out, int64_t stride, bool add) {
    auto multiply = [&](auto tiles, int64_t m, int64_t n, int64_t apart, int64_t some) {
        tiles(weight, BITS == 4 ? pairs + n * panel.totals : nullptr, first + n, apart, some, panel, row + m,
              out + m * stride + n, stride, add);
    };
    const int64_t wide = rows == 1 ? 4 : 2, run = count / wide; // runs as in few_rows
    if (BITS == 4) {
        const int64_t bytes = panel.stride * BITS / 8;
        ask_for_starts((const uint8_t *)weight.data + first * bytes, wide, run * bytes, CODES_AHEAD);
        ask_for_starts(pairs, wide, run * panel.totals * sizeof(uint32_t), 256);
    }
    for (int64_t n = 0; n < run; n += NEAR) {
        const int64_t some = least(NEAR, run - n);
        ask_for_starts(weight.scale + first + n, wide, run * sizeof(float), some * sizeof(float));
        if (rows == 1) {
            multiply(coded_tiles<Code, BITS, WORDS, SIZE, 1, 4>, 0, n, run, some);
        } else if constexpr (!std::is_same_v<Code, Halves>) {
            int64_t m = 0;
            for (; m + 4 <= rows; m += 4) multiply(coded_tiles<Code, BITS, WORDS, SIZE, 4, 2>, m, n, run, some);
            for (; m + 2 <= rows; m += 2) multiply(coded_tiles<Code, BITS, WORDS, SIZE, 2, 2>, m, n, run, some);
            if (m < rows) multiply(coded_tiles<Code, BITS, WORDS, SIZE, 1, 2>, m, n, run, some);
        }
    }
    for (int64_t n = wide * run; n < count; n++)
        for (int64_t m = 0; m < rows; m++) multiply(coded_tiles<Code, BITS, WORDS, SIZE, 1, 1>, m, n, 1, 1);
}

// 4 bits: with the weight's pairs, or with some that are made for a part of its features at a time.
template <class Code, int WORDS, int SIZE>
void int4_products(const lk_weight &weight, const Panel &panel, int64_t row, int64_t rows, int64_t first, int64_t count,
                   float *out, int64_t stride, bool add) {
    if (weight.group_pairs)
        return coded_products<Code, 4, WORDS, SIZE>(weight, weight.group_pairs + first * panel.totals, panel, row, rows, first,
                                              count, out, stride, add);
    uint32_t pairs[lk::MAX_GROUPS];
    const int64_t part = lk::MAX_GROUPS / panel.totals;
    memset(pairs, 0, (size_t)(least(part, count) * panel.totals) * sizeof(uint32_t));
    for (int64_t n = 0; n < count; n += part) {
        const int64_t some = least(part, count - n);
        for (int64_t g = 0; g < panel.groups; g++)
            for (int64_t i = 0; i < some; i++) pairs[i * panel.totals + g] = pair_of(weight, first + n + i, g, panel.totals);
        coded_products<Code, 4, WORDS, SIZE>(weight, pairs, panel, row, rows, first + n, some, out + n, stride, add);
    }
}

template <class Code, class... Rest>
void int4_products(const lk_weight &weight, const Rest &...rest) {
    switch (weight.group_size) {
    case 64:
        return int4_products<Code, words_of(16), 64>(weight, rest...);
    case 128:
        return int4_products<Code, words_of(32), 128>(weight, rest...);
    default:
        return int4_products<Code, words_of(64), 256>(weight, rest...);
    }
}

} // namespace
