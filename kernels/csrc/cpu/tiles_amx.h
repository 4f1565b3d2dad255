// Products of tiles by AMX: registers of 16 rows of 64 bytes, which multiply and add whole tiles.
#pragma once

#include "isa.h"
#include "vectors.h"

namespace {

constexpr int64_t PIECE = 256, GROUP = 8 * SIDE, STREAMED_ROWS = 2 * lk::ROW_BLOCK;
constexpr bool HALVES = false; // of tiles are not faster
constexpr int64_t TILE_ROWS = 1, CODED_TILE_ROWS = 5;

struct alignas(64) TileShapes { // as the processor reads it: all eight tiles are whole
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles are there while one of these is.
struct Tiles {
    Tiles() {
        const TileShapes shapes;
        _tile_loadconfig(&shapes);
    }
    ~Tiles() { _tile_release(); }
};

// Up to SIDE features of DEEP values that are not all there: the rest is 0.
INLINE void copy_edge(const char *w, int64_t row, int64_t features, int64_t values, char *out) {
    memset(out, 0, SIDE * DEEP * 2);
    for (int64_t n = 0; n < features; n++) memcpy(out + n * DEEP * 2, w + n * row, (size_t)values * 2);
}

// The tile of weights in register W (the compiler wants to read its number) with R tiles of activations.
#define MEET(W, X)                                  \
    _tile_loadd(6, (X), 2 * DEEP);                  \
    _tile_dpbf16ps(0, W, 6);                        \
    if (R > 1) _tile_loadd(7, (X) + block, 2 * DEEP); \
    if (R > 1) _tile_dpbf16ps(1, W, 7);             \
    if (R > 2) _tile_loadd(6, (X) + 2 * block, 2 * DEEP); \
    if (R > 2) _tile_dpbf16ps(2, W, 6);             \
    if (R > 3) _tile_loadd(7, (X) + 3 * block, 2 * DEEP); \
    if (R > 3) _tile_dpbf16ps(3, W, 7)

// Up to SIDE features with R tiles of activations, which lie `block` apart, over `width` values of K; out: (R, SIDE, SIDE),
// which is added to where there is more. Every weight is read once, whatever R.
template <int R, bool>
INLINE void multiply_tiles(const char *w, int64_t row, int64_t width, int64_t features, const uint16_t *x, int64_t block,
                           float *out, bool more, bool) {
    constexpr int64_t SIZE = SIDE * SIDE, BYTES = 4 * SIDE;
    if (more) {
        _tile_loadd(0, out, BYTES);
        if (R > 1) _tile_loadd(1, out + SIZE, BYTES);
        if (R > 2) _tile_loadd(2, out + 2 * SIZE, BYTES);
        if (R > 3) _tile_loadd(3, out + 3 * SIZE, BYTES);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    const int64_t whole = features < SIDE ? 0 : width / DEEP;
    int64_t i = 0;
    for (; i + 2 <= whole; i += 2, w += 4 * DEEP, x += 2 * SIDE * DEEP) {
        _tile_loadd(4, w, row);
        MEET(4, x);
        _tile_loadd(5, w + 2 * DEEP, row);
        MEET(5, x + SIDE * DEEP);
    }
    alignas(64) char edge[2 * SIDE * DEEP];
    for (; i * DEEP < width; i++, w += 2 * DEEP, x += SIDE * DEEP) {
        copy_edge(w, row, features, least(DEEP, width - i * DEEP), edge);
        _tile_loadd(4, edge, 2 * DEEP);
        MEET(4, x);
    }
    _tile_stored(0, out, BYTES);
    if (R > 1) _tile_stored(1, out + SIZE, BYTES);
    if (R > 2) _tile_stored(2, out + 2 * SIZE, BYTES);
    if (R > 3) _tile_stored(3, out + 3 * SIZE, BYTES);
}

} // namespace
