// The inner functions of isa.h, compiled once for each instruction set (LK_ISA, LK_LANES and the compiler's flags).
#include "activations.h"
#include "attention.h"
#include "coded.h"
#include "compact_runs.h"
#include "inner.h"
#include "pairs.h"
#include "quads.h"
#include "sampling.h"
#include "tiles.h"
#include "vectors.h"
#include "weights.h"

namespace {

using lk::Panel;
using lk::Source;

constexpr int64_t PAIR = 2 * L; // bfloat16 values that are read at a time
// Few rows of x, and of the weight, at a time: 12 sums and 4 operands fill 16 registers, 24 and up to 7 are most of 32.
constexpr int ROWS = L == 16 ? 6 : 3, WIDE = 4;

// ---- activations

// Even values of each run of 2 L first, as the two halves of the weight's words meet them.
void part_pairs(float *x, int64_t count) {
    float run[PAIR];
    for (int64_t i = 0; i < count; i += PAIR) {
        memcpy(run, x + i, sizeof run);
        for (int64_t j = 0; j < L; j++) x[i + j] = run[2 * j], x[i + L + j] = run[2 * j + 1];
    }
}

// L rows side by side, so that a vector holds the same value of each.
void prepare_block(const Source &source, int64_t width, int64_t rows, int64_t first, float *out) {
    const int64_t size = source.dtype == LK_FLOAT32 ? 4 : 2;
    const char *x = (const char *)source.x + first * source.stride * size;
    Scaling scaling[L];
    for (int64_t r = 0; r < rows; r++) scaling[r] = scaling_of(source, x + r * source.stride * size, width);
    float part[L][CHUNK] = {}; // rows that are not there stay zeros
    for (int64_t from = 0; from < width; from += CHUNK) {
        const int64_t count = least(CHUNK, width - from);
        for (int64_t r = 0; r < rows; r++) {
            values_of(source, scaling[r], x + r * source.stride * size, from, count, part[r]);
        }
        turned(part[0], CHUNK, L, count, out + from * L, L);
    }
}

void prepare(const lk_weight &weight, const Source &source, int64_t first, int64_t last, const Panel &panel) {
    const int64_t width = weight.in_features;
    if (panel.layout == lk::SIDE_BY_SIDE) {
        for (int64_t row = first; row < last; row += L)
            prepare_block(source, width, least(L, last - row), row, panel.values + row * panel.stride);
        return;
    }
#if defined(__AVX512BF16__)
    if (panel.layout == lk::IN_TILES) return prepare_tiles(weight, source, first, last, panel);
    if (panel.layout == lk::IN_PAIRS) return prepare_pairs(source, width, first, last, panel);
#endif
#if defined(LK_QUADS)
    if (panel.layout == lk::IN_QUADS)
        return (weight.format == LK_WEIGHT_INT8 ? prepare_quads<8> : prepare_quads<4>)(weight, source, first, last, panel);
#endif
    const bool coded = weight.format >= LK_WEIGHT_INT8;
    const int64_t group = panel.stride / panel.groups;
    for (int64_t row = first; row < last; row++) {
        float *values = panel.values + row * panel.stride;
        const int64_t size = source.dtype == LK_FLOAT32 ? 4 : 2;
        const char *x = (const char *)source.x + row * source.stride * size;
        values_of(source, scaling_of(source, x, width), x, 0, width, values);
        for (int64_t i = 0; source.rounded && i < width; i++) values[i] = from_bf16(to_bf16(values[i]));
        memset(values + width, 0, (size_t)(panel.stride - width) * sizeof(float));
        if (weight.format == LK_WEIGHT_BFLOAT16) part_pairs(values, panel.stride);
        float all_of_them = 0, *total = panel.total + row * panel.totals, *scale = panel.scale + row * panel.totals;
        for (int64_t g = 0; coded && g < panel.groups; g++) {
            const int64_t at = row * panel.stride + g * group;
#if defined(__AVX2__)
            if (panel.layout == lk::IN_BYTES)
                encode_in_bytes(values + g * group, group, panel.bytes + at, scale + g, total + g);
            else if (panel.layout == lk::IN_HALVES)
                encode_in_halves(values + g * group, group, panel.bytes + 2 * at, scale + g, total + g);
            else
#endif
                encode(values + g * group, group, weight.format == LK_WEIGHT_INT8 ? 2 : 4, panel.codes + at, scale + g, total + g);
            all_of_them += total[g];
        }
        for (int64_t g = panel.groups; coded && g < panel.totals; g++) scale[g] = total[g] = 0;
        if (weight.format == LK_WEIGHT_INT8) total[0] = all_of_them;
    }
}

// ---- products with weights of floats

struct Float32 {
    using Value = float; // of x
    static constexpr int64_t STEP = L;
    static constexpr int64_t SIZE = 4;
    static constexpr int FEATURES = 6; // in many_rows: sums and what they are made of fill the registers
    static INLINE float value(const char *w) {
        return load<float>(w);
    }
    static INLINE vf broadcast(const char *pair, int odd) { return all(value(pair + 4 * odd)); }
    template <int M, int N>
    static INLINE void step(vf (&total)[M][N], const float *x, int64_t stride, const char *const (&w)[N]) {
        vf v[M];
        for (int m = 0; m < M; m++) v[m] = load<vf>(x + m * stride);
        for (int n = 0; n < N; n++) {
            const vf wide = load<vf>(w[n]);
            for (int m = 0; m < M; m++) total[m][n] += v[m] * wide;
        }
    }
};

struct Bfloat16 {
    using Value = float;
    static constexpr int64_t STEP = PAIR;
    static constexpr int64_t SIZE = 2;
    static constexpr int FEATURES = 4;
    static INLINE float value(const char *w) {
        return from_bf16(load<uint16_t>(w));
    }
    static INLINE vf broadcast(const char *pair, int odd) {
        const vu words = (vu)all(load<float>(pair)); // not through an integer, which would take another way to the vector
        return (vf)(odd ? words & 0xffff0000u : words << 16);
    }
    template <int M, int N>
    static INLINE void step(vf (&total)[M][N], const float *x, int64_t stride, const char *const (&w)[N]) {
        vf v[M];
        for (int m = 0; m < M; m++) v[m] = load<vf>(x + m * stride);
        for (int n = 0; n < N; n++) {
            const vf even = (vf)(load<vu>(w[n]) << 16);
            for (int m = 0; m < M; m++) total[m][n] += v[m] * even;
        }
        for (int m = 0; m < M; m++) v[m] = load<vf>(x + m * stride + L);
        for (int n = 0; n < N; n++) {
            const vf odd = (vf)(load<vu>(w[n]) & 0xffff0000u);
            for (int m = 0; m < M; m++) total[m][n] += v[m] * odd;
        }
    }
    // A run of the weight's values with each row's.
    template <int M>
    static INLINE void meet(vf (&total)[M], const float *x, int64_t stride, vu words) {
        const vf even = (vf)(words << 16), odd = (vf)(words & 0xffff0000u);
        for (int m = 0; m < M; m++) total[m] += load<vf>(x + m * stride) * even;
        for (int m = 0; m < M; m++) total[m] += load<vf>(x + m * stride + L) * odd;
    }
    static float of_row(const float *x, int64_t k) { return x[k / PAIR * PAIR + k % PAIR / 2 + k % 2 * L]; }
};

template <int M, int N>
INLINE void put(const vf (&total)[M][N], float *out, int64_t stride, int64_t apart, bool add) {
    for (int m = 0; m < M; m++) {
        float *to = out + m * stride;
        f4 row;
        if constexpr (N == 4)
            row = sums(halved(total[m][0]), halved(total[m][1]), halved(total[m][2]), halved(total[m][3]));
        else
            for (int n = 0; n < N; n++) row[n] = sum(total[m][n]);
        for (int n = 0; n < N; n++) to[n * apart] = add ? to[n * apart] + row[n] : row[n];
    }
}

// M rows of x with N of the weight, which lie `apart` rows from each other.
template <class W, int M, int N>
void tile(const lk_weight &weight, int64_t n, int64_t apart, const typename W::Value *x, int64_t stride, float *out,
          int64_t out_stride, bool add) {
    vf total[M][N] = {};
    const char *w[N];
    const int64_t width = weight.in_features, row = (weight.row_stride ? weight.row_stride : width) * W::SIZE;
    for (int i = 0; i < N; i++) w[i] = (const char *)weight.data + (n + i * apart) * row;
    int64_t k = 0;
    if constexpr (M == 1) { // two sets of sums: one alone would wait for itself
        vf second[M][N] = {};
        for (; k + 2 * W::STEP <= width; k += 2 * W::STEP) {
            const char *next[N];
            for (int i = 0; i < N; i++) next[i] = w[i] + W::STEP * W::SIZE;
            W::template step<M, N>(total, x + k, stride, w);
            W::template step<M, N>(second, x + k + W::STEP, stride, next);
            for (int i = 0; i < N; i++) w[i] += 2 * W::STEP * W::SIZE;
        }
        for (int i = 0; i < N; i++) total[0][i] += second[0][i];
    }
    for (; k + W::STEP <= width; k += W::STEP) {
        W::template step<M, N>(total, x + k, stride, w);
        for (int i = 0; i < N; i++) w[i] += W::STEP * W::SIZE;
    }
    if (k < width) { // x is padded with zeros, the weight is not
        char rest[N][W::STEP * W::SIZE] = {};
        const char *copied[N];
        for (int i = 0; i < N; i++) copied[i] = rest[i], memcpy(rest[i], w[i], (size_t)((width - k) * W::SIZE));
        W::template step<M, N>(total, x + k, stride, copied);
    }
    put<M, N>(total, out, out_stride, apart, add);
}

#if defined(LK_COMPACT)
// The compact form of a weight, where so many rows meet that in place of the weight.
const lk_compact *compact_for(const lk_weight &weight, int64_t rows) {
    static_assert(COMPACT_ROWS == 2); // tiles() has one and two
    return rows <= COMPACT_ROWS ? weight.compact : nullptr;
}

// M rows of x with N of a compact weight's, which lie `apart` rows from each other; without what stands in its list.
template <class W, int M, int N>
void compact_tile(const lk_compact &weight, int64_t n, int64_t apart, const typename W::Value *x, int64_t stride, float *out,
                  int64_t out_stride, bool add) {
    constexpr int64_t AHEAD = 256; // bytes
    const vb upper = table_of(weight);
    vf total[2][N][M] = {}; // two sets of sums: one alone would wait for itself
    const uint8_t *w[N];
    for (int i = 0; i < N; i++) w[i] = weight.data + (n + i * apart) * weight.row_bytes;
    for (int64_t k = 0; k < weight.in_features; k += lk_compact::BLOCK)
#pragma GCC unroll 4 // or the sums would lie in memory
        for (int i = 0; i < N; i++) {
            for (int64_t line = 0; line < lk_compact::BYTES; line += 64) __builtin_prefetch(w[i] + AHEAD + line);
            each_run(w[i], upper, [&](int run, vu words) {
                W::template meet<M>(total[run % 2][i], x + k + run * PAIR, stride, words);
            });
            w[i] += lk_compact::BYTES;
        }
    vf turned[M][N];
    for (int m = 0; m < M; m++)
        for (int i = 0; i < N; i++) turned[m][i] = total[0][i][m] + total[1][i][m];
    put<M, N>(turned, out, out_stride, apart, add);
}

// What a compact weight's list adds to what has been made of its blocks.
template <class W>
void add_listed(const lk_compact &weight, const typename W::Value *x, int64_t stride, int64_t rows, int64_t first,
                int64_t count, float *out, int64_t out_stride) {
    const int64_t *list = weight.first + first;
    for (int64_t n = 0; list[n] < list[count]; n++)
        for (int64_t i = list[n]; i < list[n + 1]; i++)
            for (int64_t m = 0; m < rows; m++)
                out[m * out_stride + n] += weight.missing[i] * W::of_row(x + m * stride, weight.at[i]);
}
#endif

template <class W, int N>
void tiles(const lk_weight &weight, int64_t n, int64_t apart, const typename W::Value *x, int64_t stride, int64_t rows,
           float *out, int64_t out_stride, bool add) {
#if defined(LK_COMPACT)
    if constexpr (W::SIZE == 2)
        if (const lk_compact *compact = compact_for(weight, rows))
            return (rows == 1 ? compact_tile<W, 1, N> : compact_tile<W, 2, N>)(*compact, n, apart, x, stride, out, out_stride, add);
#endif
    int64_t m = 0;
    if constexpr (ROWS < 4) {
        if (constexpr int HALF = (N + 1) / 2; rows == 4) {
            for (int i = 0; i < N; i += HALF)
                tile<W, 4, HALF>(weight, n + i * apart, apart, x, stride, out + i * apart, out_stride, add);
            return;
        }
    }
    auto some = [&](auto of_rows) {
        of_rows(weight, n, apart, x + m * stride, stride, out + m * out_stride, out_stride, add);
    };
    for (; rows - m >= ROWS; m += ROWS) some(tile<W, ROWS, N>);
    if constexpr (ROWS > 3) {
        if (rows - m == 5) return some(tile<W, 5, N>);
        if (rows - m == 4) return some(tile<W, 4, N>);
        if (rows - m == 3) return some(tile<W, 3, N>);
    }
    if (rows - m == 2) return some(tile<W, 2, N>);
    if (rows - m == 1) some(tile<W, 1, N>);
}

// The weight's rows in WIDE runs that are read side by side: each is a stream that the processor sees ahead in. Rows
// that are neighbours would make streams as short as a row.
template <class W>
void few_rows(const lk_weight &weight, const typename W::Value *x, int64_t stride, int64_t rows, int64_t first, int64_t count,
              float *out, int64_t out_stride, bool add) {
    const int64_t run = count / WIDE;
    for (int64_t n = 0; n < run; n++) tiles<W, WIDE>(weight, first + n, run, x, stride, rows, out + n, out_stride, add);
    for (int64_t n = WIDE * run; n < count; n++)
        tiles<W, 1>(weight, first + n, 1, x, stride, rows, out + n, out_stride, add);
#if defined(LK_COMPACT)
    if constexpr (W::SIZE == 2)
        if (const lk_compact *compact = compact_for(weight, rows))
            add_listed<W>(*compact, x, stride, rows, first, count, out, out_stride);
#endif
}

typedef float f2 __attribute__((vector_size(8)));

template <class V>
INLINE void put_part(V part, float *out, bool add) {
    store(out, add ? load<V>(out) + part : part);
}

// How far ahead a weight's rows are asked for: short ones end before the processor has seen that they are read in order.
INLINE int64_t look_ahead(int64_t row_bytes, int64_t rows) { return row_bytes <= 4096 ? rows * row_bytes : 1024; }

// Lane m of N vectors into N neighbours of row m.
template <int N>
INLINE void put_lanes(const vf (&total)[N], float *out, int64_t stride, int64_t rows, bool add) {
    for (int part = 0; part < L / 4; part++) {
        f4 v[N];
        for (int n = 0; n < N; n++) memcpy(&v[n], (const char *)&total[n] + 16 * part, 16);
        float *to = out + 4 * part * stride;
        const int64_t some = least(4, rows - 4 * part);
        int n = 0;
        for (; n + 4 <= N; n += 4) {
            const f4 low = __builtin_shufflevector(v[n], v[n + 1], 0, 4, 1, 5);
            const f4 low2 = __builtin_shufflevector(v[n + 2], v[n + 3], 0, 4, 1, 5);
            const f4 high = __builtin_shufflevector(v[n], v[n + 1], 2, 6, 3, 7);
            const f4 high2 = __builtin_shufflevector(v[n + 2], v[n + 3], 2, 6, 3, 7);
            const f4 row[4] = {__builtin_shufflevector(low, low2, 0, 1, 4, 5), __builtin_shufflevector(low, low2, 2, 3, 6, 7),
                               __builtin_shufflevector(high, high2, 0, 1, 4, 5), __builtin_shufflevector(high, high2, 2, 3, 6, 7)};
            for (int m = 0; m < 4; m++)
                if (m < some) put_part(row[m], to + m * stride + n, add);
        }
        for (; n + 2 <= N; n += 2) {
            const f4 pairs[2] = {__builtin_shufflevector(v[n], v[n + 1], 0, 4, 1, 5),
                                 __builtin_shufflevector(v[n], v[n + 1], 2, 6, 3, 7)};
            for (int m = 0; m < 4; m++)
                if (m < some) put_part(load<f2>((const char *)pairs + 8 * m), to + m * stride + n, add);
        }
        for (; n < N; n++)
            for (int m = 0; m < 4; m++)
                if (m < some) put_part(v[n][m], to + m * stride + n, add);
    }
}

// Many rows: a lane of a vector is a row of x, so that nothing is added up across lanes. R vectors of rows with N of the
// weight's, over `count` values of K from `w` and `x` on; row and block: bytes and floats from one to the next.
template <class W, int R, int N>
void lanes(const char *w, int64_t row, const float *x, int64_t block, int64_t count, int64_t rows, float *out,
           int64_t out_stride, bool add, int64_t ahead) {
    constexpr int SETS = R == 1 ? 2 : 1; // of sums: one alone would wait for itself
    vf total[SETS][R][N] = {};
    int64_t k = 0;
    for (; k + 2 <= count; k += 2, w += 2 * W::SIZE) {
        if (!(k % (32 / W::SIZE)))
            for (int n = 0; n < N; n++) __builtin_prefetch(w + n * row + ahead);
        for (int odd = 0; odd < 2; odd++) {
            vf v[R];
            for (int r = 0; r < R; r++) v[r] = load<vf>(x + r * block + (k + odd) * L);
            for (int n = 0; n < N; n++) {
                const vf one = W::broadcast(w + n * row, odd);
                for (int r = 0; r < R; r++) total[odd % SETS][r][n] += v[r] * one;
            }
        }
    }
    for (int r = 0; r < R; r++) {
        for (int n = 0; n < N; n++) {
            if (SETS == 2) total[0][r][n] += total[1][r][n];
            if (k < count) total[0][r][n] += load<vf>(x + r * block + k * L) * W::value(w + n * row);
        }
        put_lanes<N>(total[0][r], out + r * L * out_stride, out_stride, least(L, rows - r * L), add);
    }
}

template <class W, int N>
void blocks_of_lanes(const char *w, int64_t row, const float *x, int64_t block, int64_t count, int64_t rows, float *out,
                     int64_t out_stride, bool add) {
    int64_t m = 0, ahead = look_ahead(row, N);
    for (; rows - m > L; m += 2 * L, ahead = 0)
        lanes<W, 2, N>(w, row, x + m / L * block, block, count, rows - m, out + m * out_stride, out_stride, add, ahead);
    if (m < rows)
        lanes<W, 1, N>(w, row, x + m / L * block, block, count, rows - m, out + m * out_stride, out_stride, add, ahead);
}

template <class W>
void many_rows(const lk_weight &weight, const float *x, int64_t stride, int64_t rows, int64_t first, int64_t count,
               float *out, int64_t out_stride, bool add) {
    constexpr int64_t PIECE = 1024; // of K: x stays in the second cache while all of the weight's rows pass by
    const int64_t width = weight.in_features, row = (weight.row_stride ? weight.row_stride : width) * W::SIZE;
    for (int64_t from = 0; from < width; from += PIECE) {
        const int64_t some = least(PIECE, width - from);
        const char *w = (const char *)weight.data + first * row + from * W::SIZE;
        const float *piece = x + from * L;
        const bool more = add || from;
        int64_t n = 0;
        for (; n + W::FEATURES <= count; n += W::FEATURES)
            blocks_of_lanes<W, W::FEATURES>(w + n * row, row, piece, L * stride, some, rows, out + n, out_stride, more);
        for (; n + 2 <= count; n += 2)
            blocks_of_lanes<W, 2>(w + n * row, row, piece, L * stride, some, rows, out + n, out_stride, more);
        if (n < count) blocks_of_lanes<W, 1>(w + n * row, row, piece, L * stride, some, rows, out + n, out_stride, more);
    }
}

void products(const lk_weight &weight, const Panel &panel, int64_t first_row, int64_t rows, int64_t first, int64_t count,
              float *out, int64_t out_stride, bool add) {
    const float *x = panel.values + first_row * panel.stride;
    const bool wide = panel.layout == lk::SIDE_BY_SIDE;
#if defined(__AVX512BF16__)
    if (panel.layout == lk::IN_TILES) return tile_products(weight, panel, first_row, rows, first, count, out, out_stride, add);
    if (panel.layout == lk::IN_PAIRS)
        return few_rows<Pairs>(weight, panel.halves + first_row * panel.stride, panel.stride, rows, first, count, out,
                               out_stride, add);
#endif
#if defined(LK_QUADS)
    if (panel.layout == lk::IN_QUADS) return quad_products(weight, panel, first_row, rows, first, count, out, out_stride, add);
#endif
    switch (weight.format) {
    case LK_WEIGHT_FLOAT32:
        return (wide ? many_rows<Float32> : few_rows<Float32>)(weight, x, panel.stride, rows, first, count, out, out_stride, add);
    case LK_WEIGHT_BFLOAT16:
        return (wide ? many_rows<Bfloat16> : few_rows<Bfloat16>)(weight, x, panel.stride, rows, first, count, out, out_stride, add);
    case LK_WEIGHT_INT8:
        return coded_products<int16_t, 8, words_of(lk::QUANTUM / 2), lk::QUANTUM>(weight, nullptr, panel, first_row, rows,
                                                                                  first, count, out, out_stride, add);
    case LK_WEIGHT_INT4:
#if defined(__AVX2__)
        if (panel.layout == lk::IN_BYTES)
            return int4_products<int8_t>(weight, panel, first_row, rows, first, count, out, out_stride, add);
        if (panel.layout == lk::IN_HALVES)
            return int4_products<Halves>(weight, panel, first_row, rows, first, count, out, out_stride, add);
#endif
        return int4_products<int16_t>(weight, panel, first_row, rows, first, count, out, out_stride, add);
    }
}

// ---- what is done value by value

void turn(float *x, int64_t head_dim, const float *cos, const float *sin) {
    const int64_t half = head_dim / 2;
    float *y = x + half;
    int64_t i = 0;
    for (; i + L <= half; i += L) {
        const vf a = load<vf>(x + i), b = load<vf>(y + i), c = load<vf>(cos + i), s = load<vf>(sin + i);
        store(x + i, a * c - b * s);
        store(y + i, b * c + a * s);
    }
    for (; i < half; i++) {
        const float a = x[i], b = y[i];
        x[i] = a * cos[i] - b * sin[i];
        y[i] = b * cos[i] + a * sin[i];
    }
}

void gelu(int64_t count, float *x) {
    int64_t i = 0;
    for (; i + L <= count; i += L) store(x + i, load<vf>(x + i) * normal_below(load<vf>(x + i)));
    for (; i < count; i++) x[i] *= normal_below(all(x[i]))[0];
}

void swiglu(int64_t count, const float *gate, const float *up, float *out) {
    for (int64_t i = 0; i < count; i += L) {
        float g[L] = {}, u[L] = {}, o[L];
        const size_t bytes = (size_t)least(L, count - i) * sizeof(float);
        const bool whole = i + L <= count;
        if (!whole) memcpy(g, gate + i, bytes), memcpy(u, up + i, bytes);
        const vf a = load<vf>(whole ? gate + i : g), b = load<vf>(whole ? up + i : u);
        const vf y = a / (bounded_power_of_two(a * -LOG2E) + 1.f) * b;
        if (whole)
            store(out + i, y);
        else
            store(o, y), memcpy(out + i, o, bytes);
    }
}

int64_t likeliest(int64_t count, const float *x) {
    vf most = all(-__builtin_inff());
    vi lost = {}, at = {}, now = {}; // at: where a lane met its largest first
    int64_t i = 0, best = 0;
    for (; i + L <= count; i += L, now += L) {
        const vf v = load<vf>(x + i);
        at = v > most ? now : at;
        most = larger(most, v), lost |= v != v;
    }
    bool any = false;
    float target = -__builtin_inff();
    for (int64_t lane = 0; lane < L; lane++) {
        const int64_t here = at[lane] + lane;
        any |= lost[lane] != 0;
        if (most[lane] > target || (most[lane] == target && here < best)) target = most[lane], best = here;
    }
    for (; i < count; i++) {
        any |= x[i] != x[i];
        if (x[i] > target) target = x[i], best = i;
    }
    for (i = 0; any && i < count; i++)
        if (x[i] != x[i]) return i;
    return best < count ? best : 0; // all of them may be -infinity
}

void layer_norm(float *x, int64_t rows, int64_t width, const float *weight, const float *shift, float eps) {
    const Source source{LK_FLOAT32, x, width, weight, shift, eps, false};
    for (int64_t r = 0; r < rows; r++, x += width) normalise(source, scaling_of(source, x, width), 0, width, x);
}

void biased(float *x, int64_t stride, int64_t rows, int64_t count, const float *bias, bool quick_gelu) {
    for (int64_t m = 0; m < rows; m++, x += stride) {
        int64_t i = 0;
        for (; i + L <= count; i += L) {
            const vf y = load<vf>(x + i) + load<vf>(bias + i);
            store(x + i, quick_gelu ? y / (exponential(y * -1.702f) + 1.f) : y);
        }
        for (; i < count; i++) {
            const float y = x[i] + bias[i];
            x[i] = quick_gelu ? y / (exponential(all(y * -1.702f))[0] + 1.f) : y;
        }
    }
}

} // namespace

#define NAME_(x) #x
#define NAME(x) NAME_(x)

namespace lk {
extern const Isa LK_ISA;
const Isa LK_ISA = {NAME(LK_ISA), L, TILE_ROWS, CODED_TILE_ROWS, QUAD_ROWS, HALF_QUAD_ROWS, COMPACT_ROWS, TAKES_BYTES, prepare, products, turn,
                    gelu, swiglu, attend, to_float, from_float, layer_norm, biased, LK_INNER::rms_norm, LK_INNER::rms_norm_backward, LK_INNER::rope,
                    LK_INNER::swiglu_rows, LK_INNER::swiglu_rows_backward,
                    LK_INNER::varlen_attention, LK_INNER::varlen_attention_backward, draw, likeliest,
                    LK_INNER::across, LK_INNER::down, LK_INNER::normalise};
} // namespace lk
