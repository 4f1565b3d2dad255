// A picture's bytes resized in width and in height, by sums of integers as Pillow makes them. Compiled for the
// instruction sets that LK_LIKE names, see inner.h.
#include "inner.h"
#include "vectors.h"

namespace {

typedef uint8_t vb __attribute__((vector_size(L)));
typedef uint8_t b16 __attribute__((vector_size(16)));
constexpr int ROWS = (int)lk::PICTURE_ROWS;
static_assert(ROWS == sizeof(b16));

constexpr int FRACTION = 22; // bits of a weight

INLINE vi widened(const uint8_t *from) {
#if LK_LANES == 16
    return (vi)_mm512_maskz_cvtepu8_epi32(0xffff, load<__m128i>(from)); // GCC warns of the one without a mask
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    return __builtin_convertvector(load<vb>(from), vi);
#endif
}

// Of 16 bytes, each times some weights.
struct Sums {
    vi of[ROWS / L];
};
INLINE Sums half() { // what rounds
    Sums sums;
    for (vi &sum : sums.of) sum = vi{} + (1 << (FRACTION - 1));
    return sums;
}
INLINE void add(Sums &sums, const uint8_t *from, int32_t weight) {
    for (int i = 0; i < ROWS / L; i++) sums.of[i] += widened(from + i * L) * weight;
}

// What is over the ends of a byte's range is set to them.
INLINE b16 rounded(const Sums &sums) {
#if LK_LANES == 16
    const vi value = sums.of[0] >> FRACTION;
    return (b16)_mm512_maskz_cvtusepi32_epi8(0xffff, (__m512i)(value < 0 ? vi{} : value));
#elif defined(__AVX2__)
    const __m256i half = _mm256_packs_epi32((__m256i)(sums.of[0] >> FRACTION), (__m256i)(sums.of[1] >> FRACTION));
    const __m256i whole = _mm256_permute4x64_epi64(half, 0xd8); // packing works on each 128 bits by themselves
    return (b16)_mm_packus_epi16(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
#elif defined(__SSE2__)
    __m128i value[4];
    for (int i = 0; i < 4; i++) value[i] = (__m128i)(sums.of[i] >> FRACTION);
    return (b16)_mm_packus_epi16(_mm_packs_epi32(value[0], value[1]), _mm_packs_epi32(value[2], value[3]));
#else
    b16 bytes;
    for (int i = 0; i < ROWS; i++) {
        const int32_t value = sums.of[i / L][i % L] >> FRACTION;
        bytes[i] = (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
    }
    return bytes;
#endif
}

// (16, 16) bytes with rows for columns: each of four steps puts the halves of two vectors side by side.
INLINE void turn(b16 (&v)[16]) {
    for (int step = 0; step < 4; step++) {
        b16 next[16];
        for (int i = 0; i < 8; i++) {
            next[2 * i] = __builtin_shufflevector(v[i], v[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            next[2 * i + 1] =
                __builtin_shufflevector(v[i], v[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        for (int i = 0; i < 16; i++) v[i] = next[i];
    }
}

// to[i] = byte i of each row, for i < bytes.
INLINE void turn_some(const uint8_t *const *rows, int64_t at, uint8_t *to) {
    b16 block[16];
    for (int row = 0; row < ROWS; row++) block[row] = load<b16>(rows[row] + at);
    turn(block);
    memcpy(to + at * ROWS, block, sizeof block);
}
void turn_rows(const uint8_t *const *rows, int64_t bytes, uint8_t *to) {
    int64_t at = 0;
    for (; at + 16 <= bytes; at += 16) turn_some(rows, at, to);
    if (at < bytes && bytes >= 16) return turn_some(rows, bytes - 16, to); // some once more: nothing is read behind a row
    for (; at < bytes; at++)
        for (int row = 0; row < ROWS; row++) to[at * ROWS + row] = rows[row][at];
}

// (bytes, ROWS) -> (ROWS, bytes); bytes is a multiple of 16.
void turn_back(const uint8_t *from, int64_t bytes, uint8_t *to) {
    for (int64_t at = 0; at < bytes; at += 16) {
        b16 block[16];
        memcpy(block, from + at * ROWS, sizeof block);
        turn(block);
        for (int row = 0; row < ROWS; row++) store(to + row * bytes + at, block[row]);
    }
}

// N times 16 neighbouring bytes at `at`.
template <int N>
INLINE void some_down(const lk::Taps &taps, const uint8_t *const *rows, int64_t at, uint8_t *out) {
    Sums sums[N];
    for (Sums &some : sums) some = half();
    for (int64_t t = 0; t < taps.count; t++)
        for (int n = 0; n < N; n++) add(sums[n], rows[t] + at + n * 16, taps.weight[t]);
    for (int n = 0; n < N; n++) store(out + at + n * 16, rounded(sums[n]));
}

} // namespace

namespace lk::LK_INNER {

void across(const Across &task, const uint8_t *const *rows, uint8_t *out) {
    turn_rows(rows, task.bytes, task.turned + task.before * ROWS);
    for (int64_t column = 0; column < task.columns; column++) {
        const Taps taps = task.taps[column];
        const uint8_t *from = task.turned + taps.first * task.pixel * ROWS;
        Sums red = half(), green = half(), blue = half();
        for (int64_t t = 0; t < taps.count; t++, from += task.pixel * ROWS) {
            add(red, from, taps.weight[t]);
            add(green, from + ROWS, taps.weight[t]);
            add(blue, from + 2 * ROWS, taps.weight[t]);
        }
        uint8_t *to = task.made + column * ROWS;
        store(to, rounded(red));
        store(to + task.plane * ROWS, rounded(green));
        store(to + 2 * task.plane * ROWS, rounded(blue));
    }
    turn_back(task.made, 3 * task.plane, out);
}

void down(const Taps &taps, const uint8_t *const *rows, int64_t bytes, uint8_t *out) {
    int64_t at = 0;
    for (; at + 32 <= bytes; at += 32) some_down<2>(taps, rows, at, out);
    for (; at + 16 <= bytes; at += 16) some_down<1>(taps, rows, at, out);
    if (at < bytes && bytes >= 16) return some_down<1>(taps, rows, bytes - 16, out); // some once more
    for (; at < bytes; at++) {
        int32_t sum = 1 << (FRACTION - 1);
        for (int64_t t = 0; t < taps.count; t++) sum += rows[t][at] * taps.weight[t];
        const int32_t value = sum >> FRACTION;
        out[at] = (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
    }
}

void normalise(const uint8_t *from, int64_t count, float scale, float shift, float *out) {
    int64_t i = 0;
    for (; i + L <= count; i += L) store(out + i, __builtin_convertvector(widened(from + i), vf) * scale + shift);
    for (; i < count; i++) out[i] = (float)from[i] * scale + shift;
}

} // namespace lk::LK_INNER
