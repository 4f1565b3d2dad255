// The inner functions of isa.h, compiled once for each instruction set (LK_ISA, LK_LANES and the compiler's flags).
#include "isa.h"
#include "vectors.h"

namespace {

using lk::Attention;
using lk::Panel;
using lk::Source;

constexpr int64_t PAIR = 2 * L; // bfloat16 values that are read at a time
constexpr int ROWS = 3, WIDE = 4; // of x and of the weight, multiplied at a time: 12 sums and 4 operands fill 16 registers

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- activations

void to_float(lk_dtype dtype, const void *from, float *to, int64_t count) {
    int64_t i = 0;
    if (dtype == LK_FLOAT32) {
        memcpy(to, from, (size_t)count * sizeof(float));
        return;
    }
    const uint16_t *half = (const uint16_t *)from;
    for (; i + L <= count; i += L) store(to + i, load_bf16(half + i));
    for (; i < count; i++) to[i] = from_bf16(half[i]);
}

void from_float(lk_dtype dtype, const float *from, void *to, int64_t count) {
    if (dtype == LK_FLOAT32) {
        memcpy(to, from, (size_t)count * sizeof(float));
        return;
    }
    uint16_t *half = (uint16_t *)to;
    for (int64_t i = 0; i < count; i++) half[i] = to_bf16(from[i]);
}

float inverse_norm(const float *x, int64_t width, float eps) {
    vf total = {};
    float rest = 0;
    int64_t i = 0;
    for (; i + L <= width; i += L) {
        vf v = load<vf>(x + i);
        total += v * v;
    }
    for (; i < width; i++) rest += x[i] * x[i];
    return 1.f / __builtin_sqrtf((sum(total) + rest) / (float)width + eps);
}

void scaled(const float *x, float factor, const float *weight, float *out, int64_t width) {
    int64_t i = 0;
    for (; i + L <= width; i += L) store(out + i, load<vf>(x + i) * factor * load<vf>(weight + i));
    for (; i < width; i++) out[i] = x[i] * factor * weight[i];
}

// Even values of each run of 2 L first, as the two halves of the weight's words meet them.
void part_pairs(float *x, int64_t count) {
    float run[PAIR];
    for (int64_t i = 0; i < count; i += PAIR) {
        memcpy(run, x + i, sizeof run);
        for (int64_t j = 0; j < L; j++) x[i + j] = run[2 * j], x[i + L + j] = run[2 * j + 1];
    }
}

// A group of values as integers of 16 bits.
void encode(const float *x, int64_t count, int16_t *codes, float *scale, float *total, int32_t *minus) {
    float most = 0, all_of_them = 0;
    for (int64_t i = 0; i < count; i++) {
        float size = __builtin_fabsf(x[i]);
        most = size > most ? size : most;
    }
    *scale = most / 32767.f;
    const float inverse = most > 0 ? 32767.f / most : 0;
    int32_t whole = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t code = (int32_t)__builtin_rintf(x[i] * inverse);
        codes[i] = (int16_t)code, whole += code;
    }
    all_of_them = (float)whole * *scale;
    *total = all_of_them;
    memset(minus, 0, 8 * sizeof *minus);
    minus[0] = -128 * whole;
}

void prepare(const lk_weight &weight, const Source &source, int64_t first, int64_t last, const Panel &panel) {
    const int64_t width = weight.in_features;
    const bool coded = weight.format == LK_WEIGHT_INT8 || weight.format == LK_WEIGHT_INT4;
    const int64_t group = weight.format == LK_WEIGHT_INT4 ? weight.group_size : lk::QUANTUM;
    for (int64_t row = first; row < last; row++) {
        float *values = panel.values + row * panel.stride;
        const int64_t size = source.dtype == LK_FLOAT32 ? 4 : 2;
        to_float(source.dtype, (const char *)source.x + row * source.stride * size, values, width);
        if (source.norm) scaled(values, inverse_norm(values, width, source.eps), source.norm, values, width);
        memset(values + width, 0, (size_t)(panel.stride - width) * sizeof(float));
        if (weight.format == LK_WEIGHT_BFLOAT16) part_pairs(values, panel.stride);
        for (int64_t g = 0; coded && g < panel.groups; g++) {
            const int64_t at = row * panel.groups + g;
            encode(values + g * group, group, panel.codes + row * panel.stride + g * group, panel.scale + at,
                   panel.total + at, panel.minus + 8 * at);
        }
    }
}

// ---- products with weights of floats

struct Float32 {
    static constexpr int64_t STEP = L;
    static constexpr int64_t SIZE = 4;
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
    static constexpr int64_t STEP = PAIR;
    static constexpr int64_t SIZE = 2;
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
};

template <int M, int N>
INLINE void put(const vf (&total)[M][N], float *out, int64_t stride, bool add) {
    for (int m = 0; m < M; m++) {
        float *to = out + m * stride;
        if constexpr (N == 4) {
            const f4 row = sums(total[m][0], total[m][1], total[m][2], total[m][3]);
            store(to, add ? load<f4>(to) + row : row);
        } else {
            static_assert(N == 1);
            const float one = sum(total[m][0]);
            *to = add ? *to + one : one;
        }
    }
}

// M rows of x with N of the weight, over values from..to-1 of K.
template <class W, int M, int N>
void tile(const lk_weight &weight, int64_t n, const float *x, int64_t stride, int64_t from, int64_t to, float *out,
          int64_t out_stride, bool add) {
    vf total[M][N] = {};
    const char *w[N];
    const int64_t row = (weight.row_stride ? weight.row_stride : weight.in_features) * W::SIZE;
    for (int i = 0; i < N; i++) w[i] = (const char *)weight.data + (n + i) * row + from * W::SIZE;
    // Short rows end before the processor has seen that they are read in order: the next tile's are asked for instead.
    const int64_t ahead = row <= 4096 ? N * row : 1024;
    int64_t k = from;
    if constexpr (M == 1) { // two sets of sums: one alone would wait for itself
        vf second[M][N] = {};
        for (; k + 2 * W::STEP <= to; k += 2 * W::STEP) {
            const char *next[N];
            for (int i = 0; i < N; i++) {
                next[i] = w[i] + W::STEP * W::SIZE;
                __builtin_prefetch(w[i] + ahead);
            }
            W::template step<M, N>(total, x + k, stride, w);
            W::template step<M, N>(second, x + k + W::STEP, stride, next);
            for (int i = 0; i < N; i++) w[i] += 2 * W::STEP * W::SIZE;
        }
        for (int i = 0; i < N; i++) total[0][i] += second[0][i];
    }
    for (; k + W::STEP <= to; k += W::STEP) {
        W::template step<M, N>(total, x + k, stride, w);
        for (int i = 0; i < N; i++) w[i] += W::STEP * W::SIZE;
    }
    if (k < to) { // x is padded with zeros, the weight is not
        char rest[N][W::STEP * W::SIZE] = {};
        const char *copied[N];
        for (int i = 0; i < N; i++) copied[i] = rest[i], memcpy(rest[i], w[i], (size_t)((to - k) * W::SIZE));
        W::template step<M, N>(total, x + k, stride, copied);
    }
    put<M, N>(total, out, out_stride, add);
}

template <class W, int N>
void tiles(const lk_weight &weight, int64_t n, const float *x, int64_t stride, int64_t rows, int64_t from, int64_t to,
           float *out, int64_t out_stride, bool add) {
    int64_t m = 0;
    for (; rows - m >= ROWS && rows - m != 4; m += ROWS)
        tile<W, ROWS, N>(weight, n, x + m * stride, stride, from, to, out + m * out_stride, out_stride, add);
    for (; rows - m >= 2; m += 2) // four are two and two
        tile<W, 2, N>(weight, n, x + m * stride, stride, from, to, out + m * out_stride, out_stride, add);
    if (m < rows) tile<W, 1, N>(weight, n, x + m * stride, stride, from, to, out + m * out_stride, out_stride, add);
}

template <class W>
void float_products(const lk_weight &weight, const float *x, int64_t stride, int64_t rows, int64_t first, int64_t count,
                    float *out, int64_t out_stride, bool add) {
    // x in pieces that stay in the second cache while all of the weight's rows pass by.
    const int64_t width = weight.in_features;
    const int64_t piece = rows > ROWS ? (65536 / rows + PAIR) / PAIR * PAIR : width;
    for (int64_t from = 0; from < width; from += piece) {
        const int64_t to = least(width, from + piece);
        const bool more = add || from > 0;
        int64_t n = 0;
        for (; n + WIDE <= count; n += WIDE)
            tiles<W, WIDE>(weight, first + n, x, stride, rows, from, to, out + n, out_stride, more);
        for (; n < count; n++) tiles<W, 1>(weight, first + n, x, stride, rows, from, to, out + n, out_stride, more);
    }
}

// ---- products with weights of 8 and 4 bits, whose layout is that of quantized_linear.py; integers throughout a group

template <int M, int N>
void tile_int8(const lk_weight &weight, int64_t n, const Panel &panel, int64_t row, float *out, int64_t out_stride,
               bool add) {
    const int64_t bytes = panel.groups * lk::QUANTUM;
    const uint8_t *w = (const uint8_t *)weight.data + n * bytes;
    const int64_t ahead = bytes <= 4096 ? N * bytes : 1024;
    i8 total[M][N];
    typedef float f8 __attribute__((vector_size(32)));
    f8 real[M][N] = {};
    for (int64_t g = 0; g < panel.groups; g++) {
        const int64_t at = row * panel.groups + g;
        const int16_t *x = panel.codes + row * panel.stride + g * lk::QUANTUM;
        for (int m = 0; m < M; m++)
            for (int i = 0; i < N; i++) total[m][i] = load<i8>(panel.minus + 8 * (at + m * panel.groups));
        for (int j = 0; j < 4; j++) // 16 words of 16 bits hold values 16 j.. in their lower and 64 + 16 j.. in their upper halves
            for (int i = 0; i < N; i++) {
                const uint8_t *from = w + i * bytes + g * lk::QUANTUM + 32 * j;
                if (M == 1) __builtin_prefetch(from + ahead);
                const h16 words = load<h16>(from);
                const h16 low = words & 255, high = words >> 8;
                for (int m = 0; m < M; m++) {
                    const int16_t *xm = x + m * panel.stride + 16 * j;
                    total[m][i] = multiply_add(total[m][i], low, load<h16>(xm));
                    total[m][i] = multiply_add(total[m][i], high, load<h16>(xm + 64));
                }
            }
        for (int m = 0; m < M; m++)
            for (int i = 0; i < N; i++)
                real[m][i] += __builtin_convertvector(total[m][i], f8) * panel.scale[at + m * panel.groups];
    }
    for (int m = 0; m < M; m++)
        for (int i = 0; i < N; i++) {
            f4 four = __builtin_shufflevector(real[m][i], real[m][i], 0, 1, 2, 3) +
                      __builtin_shufflevector(real[m][i], real[m][i], 4, 5, 6, 7);
            const float one = ((four[0] + four[2]) + (four[1] + four[3])) * weight.scale[n + i];
            float *to = out + m * out_stride + i;
            *to = add ? *to + one : one;
        }
}

template <int N>
INLINE f4 some_bf16(const uint16_t *from) {
    typedef uint16_t h4 __attribute__((vector_size(8)));
    typedef uint32_t u4 __attribute__((vector_size(16)));
    h4 half = {};
    memcpy(&half, from, N * sizeof *from);
    return (f4)(__builtin_convertvector(half, u4) << 16);
}

template <int M, int N>
void tile_int4(const lk_weight &weight, int64_t n, const Panel &panel, int64_t row, float *out, int64_t out_stride,
               bool add) {
    const int64_t group = weight.group_size, plane = group / 4, bytes = panel.groups * group / 2;
    const uint8_t *w = (const uint8_t *)weight.data + n * bytes;
    const int64_t ahead = bytes <= 4096 ? N * bytes : 1024;
    f4 real[M] = {};
    for (int64_t g = 0; g < panel.groups; g++) {
        const int64_t at = row * panel.groups + g;
        const int16_t *x = panel.codes + row * panel.stride + g * group;
        i8 total[M][4] = {};
        for (int64_t j = 0; j < plane; j += 16) // 16 words of 16 bits hold 16 neighbours of each of the four planes
            for (int i = 0; i < N; i++) {
                const uint8_t *from = w + i * bytes + g * group / 2 + 2 * j;
                if (M == 1) __builtin_prefetch(from + ahead);
                const h16 words = load<h16>(from);
                const h16 codes[4] = {words & 15, words >> 4 & 15, words >> 8 & 15, words >> 12};
                for (int m = 0; m < M; m++)
                    for (int p = 0; p < 4; p++)
                        total[m][i] =
                            multiply_add(total[m][i], codes[p], load<h16>(x + m * panel.stride + p * plane + j));
            }
        const f4 scale = some_bf16<N>((const uint16_t *)weight.group_scale + g * weight.out_features + n);
        const f4 offset = some_bf16<N>((const uint16_t *)weight.group_offset + g * weight.out_features + n);
        for (int m = 0; m < M; m++) {
            const i4 whole = sums(total[m][0], total[m][1], total[m][2], total[m][3]);
            real[m] += __builtin_convertvector(whole, f4) * (scale * panel.scale[at + m * panel.groups]) +
                       offset * panel.total[at + m * panel.groups];
        }
    }
    for (int m = 0; m < M; m++)
        for (int i = 0; i < N; i++) {
            const float one = real[m][i] * weight.scale[n + i];
            float *to = out + m * out_stride + i;
            *to = add ? *to + one : one;
        }
}

#define CODED(KIND)                                                                                                    \
    void products_##KIND(const lk_weight &weight, const Panel &panel, int64_t row, int64_t rows, int64_t first,       \
                         int64_t count, float *out, int64_t stride, bool add) {                                       \
        for (int64_t n = 0; n < count; n++) {                                                                         \
            const bool four = n + 4 <= count, two = n + 2 <= count;                                                   \
            int64_t m = 0;                                                                                            \
            if (rows == 1 && four) {                                                                                  \
                tile_##KIND<1, 4>(weight, first + n, panel, row, out + n, stride, add);                               \
                n += 3;                                                                                               \
            } else if (two) {                                                                                         \
                for (; m + 2 <= rows; m += 2)                                                                         \
                    tile_##KIND<2, 2>(weight, first + n, panel, row + m, out + m * stride + n, stride, add);          \
                if (m < rows)                                                                                         \
                    tile_##KIND<1, 2>(weight, first + n, panel, row + m, out + m * stride + n, stride, add);          \
                n += 1;                                                                                               \
            } else {                                                                                                  \
                for (; m < rows; m++)                                                                                 \
                    tile_##KIND<1, 1>(weight, first + n, panel, row + m, out + m * stride + n, stride, add);          \
            }                                                                                                         \
        }                                                                                                             \
    }
CODED(int8)
CODED(int4)

void products(const lk_weight &weight, const Panel &panel, int64_t first_row, int64_t rows, int64_t first, int64_t count,
              float *out, int64_t out_stride, bool add) {
    const float *x = panel.values + first_row * panel.stride;
    switch (weight.format) {
    case LK_WEIGHT_FLOAT32:
        return float_products<Float32>(weight, x, panel.stride, rows, first, count, out, out_stride, add);
    case LK_WEIGHT_BFLOAT16:
        return float_products<Bfloat16>(weight, x, panel.stride, rows, first, count, out, out_stride, add);
    case LK_WEIGHT_INT8: return products_int8(weight, panel, first_row, rows, first, count, out, out_stride, add);
    case LK_WEIGHT_INT4: return products_int4(weight, panel, first_row, rows, first, count, out, out_stride, add);
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

void swiglu(int64_t count, const float *gate, const float *up, float *out) {
    for (int64_t i = 0; i < count; i += L) {
        float g[L] = {}, u[L] = {}, o[L];
        const size_t bytes = (size_t)least(L, count - i) * sizeof(float);
        const bool whole = i + L <= count;
        if (!whole) memcpy(g, gate + i, bytes), memcpy(u, up + i, bytes);
        const vf a = load<vf>(whole ? gate + i : g), b = load<vf>(whole ? up + i : u);
        const vf y = a / (exponential(-a) + 1.f) * b;
        if (whole)
            store(out + i, y);
        else
            store(o, y), memcpy(out + i, o, bytes);
    }
}

int64_t argmax(const float *x, int64_t count) { // the first of the largest; a NaN counts as the largest, as in torch
    int64_t best = 0;
    for (int64_t i = 0; i < count; i++) {
        if (x[i] != x[i]) return i;
        if (x[i] > x[best]) best = i;
    }
    return best;
}

// ---- attention: scores of a tile of keys, softmax as it goes along (Milakov and Gimelshein 2018), values

template <int R, int T>
INLINE void scores(const float *const *q, const float *k, int64_t k_stride, int64_t dim, float *out) {
    vf total[R][T] = {};
    int64_t d = 0;
    for (; d + L <= dim; d += L) {
        vf key[T];
        for (int t = 0; t < T; t++) key[t] = load<vf>(k + t * k_stride + d);
        for (int r = 0; r < R; r++) {
            const vf v = load<vf>(q[r] + d);
            for (int t = 0; t < T; t++) total[r][t] += v * key[t];
        }
    }
    for (int r = 0; r < R; r++) {
        f4 some = {};
        if constexpr (T == 4)
            some = sums(total[r][0], total[r][1], total[r][2], total[r][3]);
        else
            for (int t = 0; t < T; t++) some[t] = sum(total[r][t]);
        for (int t = 0; t < T; t++) {
            float more = some[t];
            for (int64_t i = d; i < dim; i++) more += q[r][i] * k[t * k_stride + i];
            out[r * lk::KEY_TILE + t] = more;
        }
    }
}

template <int R, int V>
INLINE void weigh(const float *p, const float *v, int64_t v_stride, int64_t tokens, int64_t dim, const float *shrink,
                  float *out) {
    int64_t d = 0;
    for (; d + V * L <= dim; d += V * L) {
        vf total[R][V];
        for (int r = 0; r < R; r++)
            for (int i = 0; i < V; i++) total[r][i] = load<vf>(out + r * lk::MAX_HEAD_DIM + d + i * L) * shrink[r];
        for (int64_t t = 0; t < tokens; t++) {
            vf value[V];
            for (int i = 0; i < V; i++) value[i] = load<vf>(v + t * v_stride + d + i * L);
            for (int r = 0; r < R; r++)
                for (int i = 0; i < V; i++) total[r][i] += value[i] * p[r * lk::KEY_TILE + t];
        }
        for (int r = 0; r < R; r++)
            for (int i = 0; i < V; i++) store(out + r * lk::MAX_HEAD_DIM + d + i * L, total[r][i]);
    }
    for (; d < dim; d++)
        for (int r = 0; r < R; r++) {
            float total = out[r * lk::MAX_HEAD_DIM + d] * shrink[r];
            for (int64_t t = 0; t < tokens; t++) total += p[r * lk::KEY_TILE + t] * v[t * v_stride + d];
            out[r * lk::MAX_HEAD_DIM + d] = total;
        }
}

// A tile of keys or values as floats, one a row: where it lies if that is possible, else copied.
const float *gathered(const Attention &task, const void *cache, int64_t first, int64_t count, float *copy,
                      int64_t *stride) {
    const int64_t size = task.cache_dtype == LK_FLOAT32 ? 4 : 2;
    const int64_t block = first / task.block_size, last = (first + count - 1) / task.block_size;
    // The engine hands out blocks that follow one another where it can.
    bool in_one_piece = task.block_stride == task.block_size * task.token_stride || block == last;
    for (int64_t b = block; b < last; b++) in_one_piece &= task.table[b + 1] == task.table[b] + 1;
    const char *base = (const char *)cache;
    if (size == 4 && in_one_piece) {
        *stride = task.token_stride;
        return (const float *)(base +
                               (task.table[block] * task.block_stride + first % task.block_size * task.token_stride) * size);
    }
    *stride = task.head_dim;
    for (int64_t t = 0; t < count; t++) {
        const int64_t token = first + t;
        const int64_t at = task.table[token / task.block_size] * task.block_stride +
                           token % task.block_size * task.token_stride;
        to_float(task.cache_dtype, base + at * size, copy + t * task.head_dim, task.head_dim);
    }
    return copy;
}

// What becomes of a row of queries while the keys pass by: the largest score, the sum of exponentials, the weighted sum
// of the values, and by how much what was added up before is too large.
struct Rows {
    float most[lk::MAX_QUERIES], total[lk::MAX_QUERIES], shrink[lk::MAX_QUERIES];
    float *out; // (rows, MAX_HEAD_DIM)
};

// Scores of `rows` rows with a tile of keys, to exponentials; row r sees tokens up to seen + r / group.
void score_tile(const Attention &task, const float *const *q, const float *k, int64_t k_stride, int64_t count,
                int64_t begin, Rows &rows, int64_t first_row, float *p) {
    const float factor = 1.f / __builtin_sqrtf((float)task.head_dim);
    const int64_t padded = (count + L - 1) / L * L;
    for (int64_t r = 0; r < task.rows;) {
        const bool two = r + 2 <= task.rows;
        int64_t t = 0;
        for (; t + 4 <= count; t += 4)
            two ? scores<2, 4>(q + r, k + t * k_stride, k_stride, task.head_dim, p + r * lk::KEY_TILE + t)
                : scores<1, 4>(q + r, k + t * k_stride, k_stride, task.head_dim, p + r * lk::KEY_TILE + t);
        for (; t < count; t++)
            two ? scores<2, 1>(q + r, k + t * k_stride, k_stride, task.head_dim, p + r * lk::KEY_TILE + t)
                : scores<1, 1>(q + r, k + t * k_stride, k_stride, task.head_dim, p + r * lk::KEY_TILE + t);
        r += two ? 2 : 1;
    }
    for (int64_t r = 0; r < task.rows; r++) {
        float *row = p + r * lk::KEY_TILE;
        const int64_t seen = least(count, task.first + r / task.group + 1 - begin); // may be none
        for (int64_t t = seen > 0 ? seen : 0; t < padded; t++) row[t] = -__builtin_inff();
        vf highest = all(rows.most[first_row + r]);
        for (int64_t t = 0; t < padded; t += L) {
            const vf s = load<vf>(row + t) * factor;
            store(row + t, s);
            highest = larger(highest, s);
        }
        const float now = largest(highest);
        vf added = {};
        for (int64_t t = 0; t < padded; t += L) {
            const vf e = exponential(load<vf>(row + t) - now);
            store(row + t, e);
            added += e;
        }
        const float shrink = exponential(all(rows.most[first_row + r] - now))[0];
        rows.total[first_row + r] = rows.total[first_row + r] * shrink + sum(added);
        rows.most[first_row + r] = now, rows.shrink[first_row + r] = shrink;
    }
}

// Asks for a tile's keys and values of all heads, which lie side by side, before the first head's are waited for.
void prefetch_tile(const Attention &task, int64_t first, int64_t count) {
    const int64_t size = task.cache_dtype == LK_FLOAT32 ? 4 : 2, bytes = task.kv_heads * task.head_stride * size;
    for (int64_t token = first; token < first + count; token++) {
        const int64_t at = (task.table[token / task.block_size] * task.block_stride +
                            token % task.block_size * task.token_stride) * size;
        for (int64_t i = 0; i < bytes; i += 64) {
            __builtin_prefetch((const char *)task.k + at + i);
            __builtin_prefetch((const char *)task.v + at + i);
        }
    }
}

void attend(const Attention &task, float *scratch) {
    using lk::KEY_TILE;
    using lk::MAX_HEAD_DIM;
    float *k_copy = scratch, *v_copy = k_copy + KEY_TILE * MAX_HEAD_DIM, *p = v_copy + KEY_TILE * MAX_HEAD_DIM;
    const int64_t dim = task.head_dim, size = task.cache_dtype == LK_FLOAT32 ? 4 : 2;
    Rows rows;
    rows.out = p + lk::MAX_QUERIES * KEY_TILE;
    const float *q[lk::MAX_QUERIES];
    for (int64_t i = 0; i < task.kv_heads * task.rows; i++) {
        const int64_t head = i / task.rows * task.group + i % task.rows % task.group;
        q[i] = task.q + i % task.rows / task.group * task.q_stride + head * dim;
        rows.most[i] = -__builtin_inff(), rows.total[i] = 0;
        memset(rows.out + i * MAX_HEAD_DIM, 0, (size_t)dim * sizeof(float));
    }
    const int64_t keys = task.first + (task.rows - 1) / task.group + 1;
    const int64_t tile = task.kv_heads > 1 ? KEY_TILE / 4 : KEY_TILE; // all heads of one stay in the first cache
    for (int64_t begin = 0; begin < keys; begin += tile) {
        const int64_t count = least(tile, keys - begin);
        if (task.kv_heads > 1 && begin + tile < keys) prefetch_tile(task, begin + tile, least(tile, keys - begin - tile));
        for (int64_t head = 0; head < task.kv_heads; head++) {
            const int64_t at = head * task.head_stride * size, first_row = head * task.rows;
            int64_t k_stride, v_stride;
            const float *k = gathered(task, (const char *)task.k + at, begin, count, k_copy, &k_stride);
            const float *v = gathered(task, (const char *)task.v + at, begin, count, v_copy, &v_stride);
            score_tile(task, q + first_row, k, k_stride, count, begin, rows, first_row, p);
            float *out = rows.out + first_row * MAX_HEAD_DIM;
            const float *shrink = rows.shrink + first_row;
            int64_t r = 0;
            for (; r + 4 <= task.rows; r += 4)
                weigh<4, 2>(p + r * KEY_TILE, v, v_stride, count, dim, shrink + r, out + r * MAX_HEAD_DIM);
            for (; r < task.rows; r++)
                weigh<1, 4>(p + r * KEY_TILE, v, v_stride, count, dim, shrink + r, out + r * MAX_HEAD_DIM);
        }
    }
    for (int64_t i = 0; i < task.kv_heads * task.rows; i++) {
        const int64_t head = i / task.rows * task.group + i % task.rows % task.group;
        float *to = task.out + i % task.rows / task.group * task.out_stride + head * dim;
        const float inverse = 1.f / rows.total[i];
        for (int64_t d = 0; d < dim; d++) to[d] = rows.out[i * MAX_HEAD_DIM + d] * inverse;
    }
}

void rms_norm(lk_dtype dtype, int64_t width, const void *x, const void *residual, const void *weight, float eps,
              void *out, void *sum_out) {
    const uint16_t *half = (const uint16_t *)x, *half_residual = (const uint16_t *)residual;
    const uint16_t *half_weight = (const uint16_t *)weight;
    const float *real = (const float *)x, *real_residual = (const float *)residual, *real_weight = (const float *)weight;
    const bool wide = dtype == LK_FLOAT32;
    auto value = [&](int64_t i) {
        float v = wide ? real[i] : from_bf16(half[i]);
        if (residual) v += wide ? real_residual[i] : from_bf16(half_residual[i]);
        return v;
    };
    double squares = 0;
    for (int64_t i = 0; i < width; i++) squares += (double)value(i) * value(i);
    const float factor = 1.f / __builtin_sqrtf((float)(squares / (double)width) + eps);
    for (int64_t i = 0; i < width; i++) {
        const float v = value(i), y = v * factor * (wide ? real_weight[i] : from_bf16(half_weight[i]));
        if (sum_out && wide) ((float *)sum_out)[i] = v;
        if (sum_out && !wide) ((uint16_t *)sum_out)[i] = to_bf16(v);
        if (wide)
            ((float *)out)[i] = y;
        else
            ((uint16_t *)out)[i] = to_bf16(y);
    }
}

} // namespace

#define NAME_(x) #x
#define NAME(x) NAME_(x)

namespace lk {
extern const Isa LK_ISA;
const Isa LK_ISA = {NAME(LK_ISA), L,    prepare, products,   rms_norm, turn,
                    swiglu,       attend, to_float, from_float, argmax};
} // namespace lk
