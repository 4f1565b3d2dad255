// Numbers in one of the CPU's two types, exactly as many as are asked for (AddressSanitizer sees a read past the last), and
// how near a result must be.
#pragma once
#include <cmath>
#include <random>
#include <vector>

#include "checking.h"
#include "llava_kernels.h"

inline std::mt19937 generator(1);

struct Array {
    Array(lk_dtype dtype, int64_t count, float fill = NAN) : dtype(dtype) {
        std::normal_distribution<float> draw;
        for (int64_t i = 0; i < count; i++) {
            const float value = std::isnan(fill) ? draw(generator) : fill;
            if (dtype == LK_FLOAT32)
                wide.push_back(value);
            else
                narrow.push_back(half(value));
        }
    }
    void *data() { return dtype == LK_FLOAT32 ? (void *)wide.data() : (void *)narrow.data(); }
    double operator[](int64_t i) const { return dtype == LK_FLOAT32 ? wide[(size_t)i] : whole(narrow[(size_t)i]); }
    lk_dtype dtype;
    std::vector<float> wide;
    std::vector<uint16_t> narrow;
};

constexpr float UNTOUCHED = 768.f; // exact in both types: what must stay as it was

// One rounding to the type of the result, or several, and what float32 sums of numbers of `size` lose.
inline bool near(double found, double exact, double size, lk_dtype dtype, int roundings = 1) {
    const double step = dtype == LK_FLOAT32 ? 0 : std::ldexp(std::fabs(exact), -8) * 1.01 * roundings;
    return std::fabs(found - exact) <= step + 2e-6 * (size + std::fabs(exact)) + 1e-30;
}
