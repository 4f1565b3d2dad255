// A weight of bfloat16 in 12 bits a value, nothing lost: the lower byte of a value is a bit of its exponent and its fraction,
// and 4 bits say which of 16 upper bytes it has, sign and the rest of the exponent. A network's weights span few powers of
// two, so that the 16 commonest upper bytes leave some one in 10,000 out; those stand in a list of their own.
#pragma once

#include <stdint.h>

// Rows of blocks of BLOCK values: their lower bytes, then half as many bytes with 4 bits of two values each, of one in the
// first half of the block below and of one in the second above. The bytes of eight neighbours lie together, and of each 32
// values those of the runs 0, 2, 1, 3: AVX2 joins lower and upper bytes within halves of a vector, and what it takes from the
// front of both halves are neighbours then. Where a row ends within a block, the rest is some finite value.
struct lk_compact {
    static constexpr int64_t BLOCK = 128, BYTES = BLOCK / 2 * 3;
    int64_t out_features, in_features, row_bytes;
    const uint8_t *data;
    uint8_t upper[16];
    const int64_t *first; // (out_features + 1,) where a row's values that have another upper byte begin in the list
    const int32_t *at;    // of each its place in the row
    const float *missing; // what it is more than what stands there in its stead
};
