// Values of a compact weight out of their bytes, for instruction sets that look bytes up in a table of 16.
#pragma once

#include "compact.h"
#include "vectors.h"

#if defined(__AVX2__) || defined(__aarch64__)
#define LK_COMPACT

namespace {

constexpr int64_t COMPACT_ROWS = 2;
typedef uint8_t vb __attribute__((vector_size(4 * L)));

INLINE vb table_of(const lk_compact &weight) { // in each quarter or half of a vector
    uint8_t bytes[4 * L];
    for (int i = 0; i < 4 * L; i += 16) memcpy(bytes + i, weight.upper, 16);
    return load<vb>(bytes);
}

#if LK_LANES == 16
INLINE vb look_up(vb table, vb index) { return (vb)_mm512_shuffle_epi8((__m512i)table, (__m512i)index); }
INLINE void join(vb lower, vb upper, vu &front, vu &back) { // neighbours come together as in halves of a vector, see compact.h
    typedef int64_t q8 __attribute__((vector_size(64)));
    const __m512i a = (__m512i)__builtin_shufflevector((q8)lower, (q8)lower, 0, 4, 2, 6, 1, 5, 3, 7);
    const __m512i b = (__m512i)__builtin_shufflevector((q8)upper, (q8)upper, 0, 4, 2, 6, 1, 5, 3, 7);
    front = (vu)_mm512_unpacklo_epi8(a, b), back = (vu)_mm512_unpackhi_epi8(a, b);
}
#elif LK_LANES == 8
INLINE vb look_up(vb table, vb index) { return (vb)_mm256_shuffle_epi8((__m256i)table, (__m256i)index); }
INLINE void join(vb lower, vb upper, vu &front, vu &back) {
    front = (vu)_mm256_unpacklo_epi8((__m256i)lower, (__m256i)upper);
    back = (vu)_mm256_unpackhi_epi8((__m256i)lower, (__m256i)upper);
}
#else
INLINE vb look_up(vb table, vb index) { return (vb)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)index); }
INLINE void join(vb lower, vb upper, vu &front, vu &back) {
    front = (vu)vzip1q_u8((uint8x16_t)lower, (uint8x16_t)upper), back = (vu)vzip2q_u8((uint8x16_t)lower, (uint8x16_t)upper);
}
#endif

// Calls body(run, words) for the runs of 2 L neighbours of a block.
template <class F>
INLINE void each_run(const uint8_t *block, vb table, F &&body) {
    constexpr int HALF = lk_compact::BLOCK / 2, STEP = 4 * L, RUN = 2 * L;
    for (int j = 0; j < HALF; j += STEP) {
        const vb indices = load<vb>(block + lk_compact::BLOCK + j);
        for (int half = 0; half < 2; half++) {
            const vb index = (half ? (vb)((vw)indices >> 4) : indices) & (uint8_t)15;
            const int from = half * HALF + j;
            vu front, back;
            join(load<vb>(block + from), look_up(table, index), front, back);
            const int run = L == 4 ? from / 32 * 4 + from % 32 / 16 : from / RUN; // vectors of 16 bytes hold the runs 0 and 2,
            body(run, front);                                                     // then 1 and 3, see compact.h
            body(run + (L == 4 ? 2 : 1), back);
        }
    }
}

} // namespace
#else
namespace {
constexpr int64_t COMPACT_ROWS = 0;
} // namespace
#endif
