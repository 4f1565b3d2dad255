// The vectorised inner functions, one table of them an instruction set. They know nothing of threads or handles.
#pragma once

#include <stdint.h>

#include "llava_kernels.h"

namespace lk {

constexpr int64_t QUANTUM = 128; // values of K that share a scale in an activation met by int8 weights
constexpr int64_t QUAD_BLOCK = 64; // those that do IN_QUADS
constexpr int64_t PAIRS = 8;      // groups of a feature whose scales and offsets are read at a time
constexpr int64_t MAX_GROUPS = 8192; // of K in a weight of 4 bits with no group_pairs
constexpr int64_t ROW_BLOCK = 64; // rows of activations that a task multiplies at most
constexpr int64_t NEVER = INT64_MAX;
constexpr int64_t MANY_ROWS = 8;  // from so many on (and no fewer than lanes) float weights meet them side by side


// How the values of a panel lie.
enum Layout {
    BY_ROW,       // (rows, K); where the weight is bfloat16 each run of 2 L values has its even ones first, then the odd
    SIDE_BY_SIDE, // (rows / lanes, K, lanes)
    IN_TILES,     // bfloat16, (rows / 16, K / 2, 16, 2): what tiles of weights meet
    IN_PAIRS,     // bfloat16, (rows, K): pairs of neighbours meet pairs of a weight
    IN_BYTES,     // 8 bits, (rows, K), those of a group in the order of a weight's bytes of two codes of 4 bits
    IN_HALVES,    // 16 bits of one row, (K, 2 bytes), the upper and the lower ones in the order of IN_BYTES in turn
    IN_QUADS,     // 8 bits, (rows / lanes, K / 4, lanes, 4): quads of values meet quads of a weight's codes
};

// Activations as the weight's format wants them: (rows, K) prepared once, read by every output feature.
struct Panel {
    Layout layout;
    int64_t rows;
    int64_t stride; // of `values` and `codes` from row to row; from K on 0, as far as vectors read
    int64_t groups; // of K
    int64_t totals; // of `scale` and `total` from row to row: groups rounded up to a multiple of PAIRS, the rest 0
    union {
        float *values;    // float weights
        uint16_t *halves; // the same, IN_TILES and IN_PAIRS
    };
    union {
        int16_t *codes; // quantised weights: value = scale * code, those of a group in the order of the weight's words
        int8_t *bytes;  // the same, IN_BYTES, IN_HALVES and IN_QUADS
    };
    float *scale;       // (rows, totals); IN_QUADS: (rows / lanes, groups, lanes)
    union {
        float *total;    // (rows, totals) sum of a group's values; for int8 the first is that of the whole row;
                         // IN_TILES and IN_QUADS: (rows / lanes, groups, lanes), for int4 alone
        int32_t *excess; // IN_QUADS for int8: as total, what makes up for codes that are 128 too large
    };
    bool in_squares() const { return layout == IN_TILES || layout == IN_QUADS; } // of as many rows as there are lanes
};

// What is made into a panel: rows of x, normalised first where `norm` is given.
struct Source {
    lk_dtype dtype;
    const void *x;
    int64_t stride;
    const float *norm; // (K,) or NULL
    const float *shift; // (K,): the norm is LayerNorm; NULL: RMSNorm
    float eps;
    bool half;         // the model computes in bfloat16: values may be rounded to it
    bool rounded = false; // codes are made of values that have been
    bool coarse = false;  // what meets weights of 8 and 4 bits may be rounded to 8 bits
};

// A run of a sequence's queries with some of its keys, of some heads.
struct Attention {
    int64_t kv_heads;         // heads of keys
    int64_t rows;             // queries * group; kv_heads * rows is at most MAX_QUERIES; of one head
                              // of keys it may be PROMPT_QUERIES
    int64_t group;            // query heads that share the keys
    int64_t head_dim;
    const float *q;           // at the first of the heads; row r of one: query r / group, head r % group
    int64_t q_stride;         // from query to query; heads lie head_dim apart
    float *out;               // as q
    int64_t out_stride;
    int64_t first;            // position of the first query: it sees keys 0..first, the next one key more
    int64_t begin, end;       // the keys that are looked at; a query must see one of them
    float *partial;           // NULL, or what is written in place of out: attention_partial() floats for each head of queries
    lk_dtype cache_dtype;
    const void *k, *v;        // of the cache, at the first of the heads
    int64_t block_stride, token_stride, head_stride; // in elements
    int64_t block_size;
    const int32_t *table;     // the sequence's blocks
};
constexpr int64_t MAX_QUERIES = 32, PROMPT_QUERIES = 64, KEY_TILE = 64, MAX_HEAD_DIM = 256;

// Work on rows first..last-1. Strides count elements; what the header calls NULL may be NULL.
struct RmsNorm {
    lk_dtype dtype;
    int64_t width;
    float eps;
    const void *x, *residual, *weight;
    int64_t x_stride, residual_stride;
    void *out, *sum;
    float *rstd;
};
struct RmsNormBackward {
    lk_dtype dtype;
    int64_t width;
    const void *d_out, *d_sum, *x, *weight;
    int64_t d_out_stride, d_sum_stride, x_stride;
    const float *rstd;
    void *d_x;
};
struct Rope {
    lk_dtype dtype;
    int64_t heads, head_dim;
    const void *x;
    int64_t x_token_stride, x_head_stride;
    const float *cos, *sin;
    bool inverse;
    void *out;
    int64_t out_token_stride, out_head_stride;
};
struct Swiglu {
    lk_dtype dtype;
    int64_t inner;
    const void *gate_up, *d_out; // d_out: of the backward pass
    int64_t gate_up_stride, d_out_stride;
    void *out; // (rows, inner), or (rows, 2 * inner) of the backward pass
};

// One head of keys of one sequence, with the `group` heads of queries that share it. Pointers are at the sequence's first
// token and the first of the heads; heads of queries lie q_head (d_out_head) apart in q (d_out), head_dim in out and dq.
struct VarlenAttention {
    lk_dtype dtype;
    int64_t tokens, group, head_dim;
    bool causal;
    const void *q, *k, *v;
    int64_t q_token, q_head, k_token, v_token;
    void *out;         // read by the backward pass
    int64_t out_token; // of out and dq
    float *lse;        // log2 of the sum of 2^score, scores in units of log 2
    int64_t lse_head;
    const void *d_out;
    int64_t d_out_token, d_out_head;
    void *dq;          // or NULL
    void *dk, *dv;     // or both NULL
    int64_t d_kv_token;
};
constexpr int64_t FLASH_BLOCK = 64; // queries, and keys, that meet at a time
// Floats of scratch memory for a sequence of so many tokens.
constexpr int64_t flash_width(int64_t head_dim) { return (head_dim + 31) / 32 * 32; } // two of the widest vectors
constexpr int64_t flash_rows(int64_t tokens) { return (tokens + FLASH_BLOCK - 1) / FLASH_BLOCK * FLASH_BLOCK; }
constexpr int64_t flash_scratch(int64_t tokens, int64_t head_dim, bool backward) {
    const int64_t width = flash_width(head_dim), all = flash_rows(tokens) * width;
    return backward ? 8 * all + flash_rows(tokens) + 2 * FLASH_BLOCK * FLASH_BLOCK + MAX_HEAD_DIM
                    : 2 * all + 2 * FLASH_BLOCK * width + FLASH_BLOCK * FLASH_BLOCK + MAX_HEAD_DIM;
}

// A token to be drawn from one row of logits; settings as in lk_sample_args, their neutral values where they are off.
struct Draw {
    int64_t vocabulary;
    const float *logits;
    const int32_t *counts;    // (vocabulary,) or NULL: no penalties
    const uint8_t *in_prompt; // (vocabulary,) or NULL
    float repetition, presence, frequency, temperature, top_p, min_p;
    int32_t top_k;
    int64_t seed, position;
    float *scratch;           // (vocabulary rounded up to whole vectors,)
    float *logprob;           // or NULL
};

// What one row or column of a resized picture is made of: `count` of those before, from `first` on, times weights in
// units of 2^-22.
struct Taps {
    int64_t first, count;
    const int32_t *weight;
};
// Rows of a picture that are resized in width at a time: a vector holds the same byte of several rows.
constexpr int64_t PICTURE_ROWS = 16;
struct Across {
    int64_t pixel;       // bytes of one in the rows that are given, 3 or 4: red, green, blue
    int64_t before;      // bytes of the canvas before those rows
    int64_t bytes;       // of one row
    uint8_t *turned;     // (bytes of the canvas, PICTURE_ROWS), the background where the rows do not reach
    const Taps *taps;    // (columns,) in pixels of the canvas
    int64_t columns;
    int64_t plane;       // bytes from colour to colour of a result: columns rounded up to PICTURE_ROWS
    uint8_t *made;       // (3 * plane, PICTURE_ROWS) scratch memory
};

struct Isa {
    const char *name;
    int lanes;
    // From so many rows on, activations that may be rounded to bfloat16 meet tiles of weights; NEVER: the set has none.
    // Weights of bfloat16 meet fewer in pairs, codes of 8 and 4 bits are not worth making bfloat16 for fewer.
    int64_t tile_rows, coded_tile_rows;
    // From so many rows on, activations that may be rounded to 8 bits are, before weights of 8 and of 4 bits.
    int64_t quad_rows, half_quad_rows;
    // Up to so many rows a weight's compact form is met in place of it: for more, taking it apart costs more; 0: never.
    int64_t compact_rows;
    bool takes_bytes; // before weights of 4 bits: fewer activations that may be rounded to 8 are, one that may not IN_HALVES
    bool rounds(bool half) const { return half && tile_rows < NEVER; } // what meets weights of bfloat16

    // Rows first..last-1 of the panel; side by side: first is a multiple of the lanes, in tiles of 16.
    void (*prepare)(const lk_weight &weight, const Source &source, int64_t first, int64_t last, const Panel &panel);
    // out[m][n] (+)= panel row first_row + m times weight row first + n, for m < rows, n < count.
    void (*products)(const lk_weight &weight, const Panel &panel, int64_t first_row, int64_t rows, int64_t first,
                     int64_t count, float *out, int64_t out_stride, bool add);
    // (head_dim,) element i turned with element i + head_dim / 2.
    void (*turn)(float *x, int64_t head_dim, const float *cos, const float *sin);
    // x[i] *= the share of the normal distribution below it
    void (*gelu)(int64_t count, float *x);
    // out[i] = silu(gate[i]) * up[i]
    void (*swiglu)(int64_t count, const float *gate, const float *up, float *out);
    void (*attend)(const Attention &task, float *scratch);
    void (*to_float)(lk_dtype dtype, const void *from, float *to, int64_t count);
    void (*from_float)(lk_dtype dtype, const float *from, void *to, int64_t count);
    void (*layer_norm)(float *x, int64_t rows, int64_t width, const float *weight, const float *shift, float eps);
    // x (rows, count) += bias, then x * sigmoid(1.702 x) where that is asked for.
    void (*biased)(float *x, int64_t stride, int64_t rows, int64_t count, const float *bias, bool quick_gelu);

    void (*rms_norm)(const RmsNorm &task, int64_t first, int64_t last);
    // d_weight (width,) is added to, or NULL.
    void (*rms_norm_backward)(const RmsNormBackward &task, int64_t first, int64_t last, float *d_weight);
    void (*rope)(const Rope &task, int64_t first, int64_t last);
    void (*swiglu_rows)(const Swiglu &task, int64_t first, int64_t last);
    void (*swiglu_rows_backward)(const Swiglu &task, int64_t first, int64_t last);
    void (*varlen_attention)(const VarlenAttention &task, float *scratch);
    void (*varlen_attention_backward)(const VarlenAttention &task, float *scratch);

    int64_t (*draw)(const Draw &task);
    // The index of the largest, the first of equals; a NaN is the largest, as in numpy.
    int64_t (*likeliest)(int64_t count, const float *x);

    // PICTURE_ROWS rows in width; out (PICTURE_ROWS, 3, plane).
    void (*across)(const Across &task, const uint8_t *const *rows, uint8_t *out);
    // One row of `bytes` in height: the sum of taps.count rows, each times its weight.
    void (*down)(const Taps &taps, const uint8_t *const *rows, int64_t bytes, uint8_t *out);
    // out[i] = from[i] * scale + shift, rounded twice
    void (*normalise)(const uint8_t *from, int64_t count, float scale, float shift, float *out);
};
// What a query came to with some of its keys: head_dim sums of values, not divided yet by the sum of their weights, that
// sum, and the largest score, in units of log 2. The weights are 2^(score - largest).
constexpr int64_t attention_partial(int64_t head_dim) { return head_dim + 2; }
// Floats of scratch memory that attend needs.
constexpr int64_t ATTEND_SCRATCH = 2 * KEY_TILE * MAX_HEAD_DIM + PROMPT_QUERIES * (KEY_TILE + 2 * MAX_HEAD_DIM);

extern const Isa portable, avx2, avxvnni, avx512, avx512vnni, avx512bf16, amx, neon; // those that the library was built with

// The best that this processor runs, or the one called `name`; NULL where there is none of that name, or it does not run.
const Isa *find_isa(const char *name);

} // namespace lk
