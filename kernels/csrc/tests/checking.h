// What the C++ tests share: counted checks, and bfloat16 as its bits.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstring>

static int failures;

#define CHECK(condition) \
    do { if (!(condition)) failures++, std::printf("line %d: %s\n", __LINE__, #condition); } while (0)

static uint16_t half(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return (uint16_t)((bits + 0x8000) >> 16);
}

static float whole(uint16_t h) {
    const uint32_t bits = (uint32_t)h << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
