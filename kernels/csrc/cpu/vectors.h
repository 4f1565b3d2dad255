// Vectors of LK_LANES floats in the compiler's own vector types: one source for every instruction set. This file is
// compiled once for each of them, with other flags; everything is inside an unnamed namespace and nothing of the C++
// library's is used, so that no function built for one processor can be linked into another's code.
#pragma once

#include <stdint.h>
#include <string.h>

#include "llava_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int L = LK_LANES;
typedef float vf __attribute__((vector_size(4 * L)));
typedef int32_t vi __attribute__((vector_size(4 * L)));
typedef uint32_t vu __attribute__((vector_size(4 * L)));
typedef uint16_t vh __attribute__((vector_size(2 * L)));
typedef int16_t vs __attribute__((vector_size(2 * L)));
typedef uint16_t vw __attribute__((vector_size(4 * L))); // as long as a vf
typedef float f4 __attribute__((vector_size(16)));
typedef float f8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef uint16_t h16 __attribute__((vector_size(32))); // sixteen 16-bit lanes of a quantised weight
#if LK_LANES == 16
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint16_t h32 __attribute__((vector_size(64)));
INLINE vf extended(f8 x) { return __builtin_shufflevector(x, f8{}, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
#endif

template <class V>
INLINE V load(const void *from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}
template <class V>
INLINE void store(void *to, V v) {
    memcpy(to, &v, sizeof v);
}

INLINE vf all(float x) { return x - vf{}; } // what is added to 0 may be -0, and is no copy
INLINE vf larger(vf a, vf b) { return a > b ? a : b; }
INLINE vf magnitude(vf a) { return (vf)((vu)a & 0x7fffffffu); }
constexpr float ROUNDING = 12582912.f; // 1.5 * 2^23: added to a number below 2^22 and taken off again it rounds
INLINE vf nearest(vf a) { return (a + ROUNDING) - ROUNDING; }

// bfloat16 is the upper half of a float.
INLINE float from_bf16(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
INLINE uint16_t to_bf16(float f) { // to the nearest, ties to even; a NaN stays one
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (f != f) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
INLINE vf load_bf16(const uint16_t *from) {
#if defined(__AVX2__) && LK_LANES == 8 // in one instruction; GCC takes four
    const vu words = (vu)_mm256_cvtepu16_epi32(load<__m128i>(from));
#else
    const vu words = __builtin_convertvector(load<vh>(from), vu);
#endif
    return (vf)(words << 16);
}

inline void to_float(lk_dtype dtype, const void *from, float *to, int64_t count) {
    int64_t i = 0;
    if (dtype == LK_FLOAT32) {
        memcpy(to, from, (size_t)count * sizeof(float));
        return;
    }
    const uint16_t *half = (const uint16_t *)from;
    for (; i + L <= count; i += L) store(to + i, load_bf16(half + i));
    for (; i < count; i++) to[i] = from_bf16(half[i]);
}

inline void from_float(lk_dtype dtype, const float *from, void *to, int64_t count) {
    if (dtype == LK_FLOAT32) {
        memcpy(to, from, (size_t)count * sizeof(float));
        return;
    }
    uint16_t *half = (uint16_t *)to;
    for (int64_t i = 0; i < count; i++) half[i] = to_bf16(from[i]);
}

// Four floats with the same sum.
INLINE f4 halved(vf v) {
    f4 parts[L / 4];
    memcpy(parts, &v, sizeof parts);
    if constexpr (L == 16) parts[0] += parts[2], parts[1] += parts[3];
    return L == 4 ? parts[0] : parts[0] + parts[L / 4 > 1];
}

// {sum a, sum b, sum c, sum d}
INLINE f4 sums(f4 a, f4 b, f4 c, f4 d) {
    const f4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const f4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}
INLINE float sum(vf v) {
    f4 a = halved(v);
    return (a[0] + a[2]) + (a[1] + a[3]);
}
INLINE float largest(vf v) {
    f4 parts[L / 4];
    memcpy(parts, &v, sizeof parts);
    for (int i = L / 8; i > 0; i /= 2)
        for (int j = 0; j < i; j++) parts[j] = parts[j] > parts[j + i] ? parts[j] : parts[j + i];
    const f4 m = parts[0];
    const float a = m[0] > m[1] ? m[0] : m[1], b = m[2] > m[3] ? m[2] : m[3];
    return a > b ? a : b;
}

// e^r 2^n for a small r; n as it is after ROUNDING was added.
INLINE vf raised(vf r, vf n) {
    vf p = r * 0.00138888889f + 0.00833333333f;
    p = p * r + 0.0416666667f;
    p = p * r + 0.166666667f;
    p = p * r + 0.5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    return p * (vf)(((vi)n - (vi)all(ROUNDING) + 127) << 23);
}

// e^x to 2 units in the last place; below -87.3 it is 0.
INLINE vf exponential(vf x) {
    vf bounded = x < -87.3f ? all(-87.3f) : x;
    bounded = bounded > 88.f ? all(88.f) : bounded;
    const vf turned = bounded * 1.44269504f + ROUNDING, n = turned - ROUNDING;
    vf r = bounded - n * 0.693145752f;
    r = r - n * 1.42860677e-6f;
    return x < -87.3f ? all(0.f) : raised(r, turned);
}

// The share of the normal distribution below y, to 1 in a million (5 where it is very small): erfc by Numerical Recipes'
// Chebyshev fit, whose relative error is 1.2e-7 everywhere.
INLINE vf normal_below(vf y) {
    const vf z = magnitude(y) * 0.707106781f, t = 1.f / (z * 0.5f + 1.f);
    const float fit[] = {0.17087277f, -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f,
                         -0.18628806f, 0.09678418f, 0.37409196f, 1.00002368f, -1.26551223f};
    vf p = all(fit[0]);
    for (int i = 1; i < 10; i++) p = p * t + fit[i];
    const vf above = exponential(p - z * z) * t * 0.5f;
    return y < 0.f ? above : 1.f - above;
}

// 2^x to 2 units in the last place; below -126 it is 2^-126, which is enough where 1 is added.
INLINE vf bounded_power_of_two(vf x) {
    vf bounded = x < -126.f ? all(-126.f) : x;
    bounded = bounded > 127.f ? all(127.f) : bounded;
    const vf turned = bounded + ROUNDING;
    return raised((bounded - (turned - ROUNDING)) * 0.693147181f, turned); // of e^r r is within -0.35 and 0.35
}

// The same; below -126 it is 0.
INLINE vf power_of_two(vf x) { return x < -126.f ? all(0.f) : bounded_power_of_two(x); }

// sums + products of neighbouring 16-bit lanes, added in pairs (which pairs meet in which lane does not matter).
INLINE i8 multiply_add(i8 total, h16 a, h16 b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return (i8)_mm256_dpwssd_epi32((__m256i)total, (__m256i)a, (__m256i)b);
#elif defined(__AVXVNNI__)
    return (i8)_mm256_dpwssd_avx_epi32((__m256i)total, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
    return total + (i8)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    __m128i a2[2], b2[2], sum[2];
    memcpy(a2, &a, 32), memcpy(b2, &b, 32);
    sum[0] = _mm_madd_epi16(a2[0], b2[0]), sum[1] = _mm_madd_epi16(a2[1], b2[1]);
    return total + load<i8>(sum);
#elif defined(__aarch64__)
    int16x8_t a2[2], b2[2];
    int32x4_t sum[2];
    memcpy(a2, &a, 32), memcpy(b2, &b, 32), memcpy(sum, &total, 32);
    sum[0] = vmlal_high_s16(vmlal_s16(sum[0], vget_low_s16(a2[0]), vget_low_s16(b2[0])), a2[0], b2[0]);
    sum[1] = vmlal_high_s16(vmlal_s16(sum[1], vget_low_s16(a2[1]), vget_low_s16(b2[1])), a2[1], b2[1]);
    return load<i8>(sum);
#else
    for (int i = 0; i < 8; i++)
        total[i] += (int16_t)a[2 * i] * (int16_t)b[2 * i] + (int16_t)a[2 * i + 1] * (int16_t)b[2 * i + 1];
    return total;
#endif
}

#if LK_LANES == 16
INLINE i16 multiply_add(i16 total, h32 a, h32 b) {
#if defined(__AVX512VNNI__)
    return (i16)_mm512_dpwssd_epi32((__m512i)total, (__m512i)a, (__m512i)b);
#else
    return total + (i16)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
}
#endif

// sums + products of neighbouring bytes, those of a without a sign: of four in 32 bits, or of two in 16, which must hold
// them; what such sums come to in 32 bits, and what 256 times some and others do.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define LK_VNNI
typedef i8 ByteSums16;
INLINE i8 add_bytes(i8 total, h16 a, h16 b) {
#if defined(__AVX512VNNI__)
    return (i8)_mm256_dpbusd_epi32((__m256i)total, (__m256i)a, (__m256i)b);
#else
    return (i8)_mm256_dpbusd_avx_epi32((__m256i)total, (__m256i)a, (__m256i)b);
#endif
}
INLINE i8 added_up(i8 sums) { return sums; }
INLINE i8 joined(i8 upper, i8 lower) { return (upper << 8) + lower; }
#if LK_LANES == 16
typedef i16 ByteSums32;
INLINE i16 add_bytes(i16 total, h32 a, h32 b) { return (i16)_mm512_dpbusd_epi32((__m512i)total, (__m512i)a, (__m512i)b); }
INLINE i16 added_up(i16 sums) { return sums; }
INLINE i16 joined(i16 upper, i16 lower) { return (upper << 8) + lower; }
#endif
#elif defined(__AVX2__)
typedef h16 ByteSums16;
INLINE h16 add_bytes(h16 total, h16 a, h16 b) { return total + (h16)_mm256_maddubs_epi16((__m256i)a, (__m256i)b); }
INLINE i8 added_up(h16 sums) { return multiply_add(i8{}, sums, 1 - h16{}); }
INLINE i8 joined(h16 upper, h16 lower) { return multiply_add(added_up(lower), upper, 256 - h16{}); }
#if LK_LANES == 16
typedef h32 ByteSums32;
INLINE h32 add_bytes(h32 total, h32 a, h32 b) { return total + (h32)_mm512_maddubs_epi16((__m512i)a, (__m512i)b); }
INLINE i16 added_up(h32 sums) { return multiply_add(i16{}, sums, 1 - h32{}); }
INLINE i16 joined(h32 upper, h32 lower) { return multiply_add(added_up(lower), upper, 256 - h32{}); }
#endif
#endif

} // namespace
