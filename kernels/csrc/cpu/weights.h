// What a weight of 4 bits has besides its codes.
#pragma once

#include "vectors.h"

namespace {

// Scale and offset of a group of 4 bits, the scale in the upper half; stride: of group_pairs.
INLINE uint32_t pair_of(const lk_weight &weight, int64_t feature, int64_t group, int64_t stride) {
    if (weight.group_pairs) return weight.group_pairs[feature * stride + group];
    const int64_t at = group * weight.out_features + feature;
    return (uint32_t)((const uint16_t *)weight.group_scale)[at] << 16 | ((const uint16_t *)weight.group_offset)[at];
}

} // namespace
