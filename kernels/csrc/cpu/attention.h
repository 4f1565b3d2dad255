// Attention of a step's queries over the paged keys and values of their sequence, with a softmax that goes along with the
// keys (Milakov and Gimelshein 2018).
#pragma once

#include "dense.h"
#include "isa.h"
#include "vectors.h"

namespace {

using lk::Attention;

constexpr int64_t MANY_QUERIES = 8; // of one head of keys, for which these are turned
constexpr int64_t TOKENS = 16;      // keys that few queries weigh at a time
constexpr int64_t STEP = L == 16 ? 8 : 4; // those of one head that they meet at a time: their sums fill registers
constexpr int64_t RUN = 2 * L;      // dimensions that they meet at a time
constexpr int64_t LEAD = 12 << 10;  // bytes that the cache is asked for ahead of its use
constexpr int INTO = L == 16 ? 2 : 3; // where those go: the second cache, or the first. Zen 4, which can wait for fewer lines
                                      // in the first than memory has on their way, reads 30% faster into the second

// Where the tokens of a tile lie in the cache, in elements.
struct Tile {
    int64_t begin, count;
    int64_t at[lk::KEY_TILE];
};

// Of a block's token `inside`, in elements.
INLINE int64_t place_of(const Attention &task, int64_t block, int64_t inside) {
    return task.table[block] * task.block_stride + inside * task.token_stride;
}

Tile tile_at(const Attention &task, int64_t begin, int64_t count) {
    Tile tile = {begin, count, {}};
    int64_t block = begin / task.block_size, inside = begin % task.block_size;
    for (int64_t t = 0; t < count; t++, inside++) {
        if (inside == task.block_size) block++, inside = 0;
        tile.at[t] = place_of(task, block, inside);
    }
    return tile;
}

// Row i of queries, head by head, in a matrix of tokens `stride` apart.
template <class T>
INLINE T *query_of(const Attention &task, int64_t i, T *matrix, int64_t stride) {
    const int64_t head = i / task.rows, row = i % task.rows;
    return matrix + row / task.group * stride + (head * task.group + row % task.group) * task.head_dim;
}
// Where what it came to belongs.
INLINE float *result_of(const Attention &task, int64_t i) {
    return task.partial ? task.partial + i * lk::attention_partial(task.head_dim) : query_of(task, i, task.out, task.out_stride);
}

// ---- many queries

// Many queries of one head of keys: both products as dense ones, with the keys of a tile turned, so that nothing is added
// up across lanes.
void attend_many(const Attention &task, float *scratch) {
    using lk::KEY_TILE;
    using lk::MAX_HEAD_DIM;
    float *keys = scratch, *values = keys + KEY_TILE * MAX_HEAD_DIM, *p = values + KEY_TILE * MAX_HEAD_DIM;
    float *q = p + lk::PROMPT_QUERIES * KEY_TILE, *out = q + lk::PROMPT_QUERIES * MAX_HEAD_DIM;
    const int64_t dim = task.head_dim, width = (dim + PANEL - 1) / PANEL * PANEL, rows = task.rows;
    const int64_t size = task.cache_dtype == LK_FLOAT32 ? 4 : 2;
    const float factor = LOG2E / __builtin_sqrtf((float)dim); // scores are kept in units of log 2
    float most[lk::PROMPT_QUERIES], total[lk::PROMPT_QUERIES];
    for (int64_t r = 0; r < rows; r++) {
        memcpy(q + r * dim, task.q + r / task.group * task.q_stride + r % task.group * dim, (size_t)dim * sizeof(float));
        memset(out + r * width, 0, (size_t)width * sizeof(float));
        most[r] = -__builtin_inff(), total[r] = 0;
    }
    for (int64_t begin = task.begin; begin < task.end; begin += KEY_TILE) {
        const Tile tile = tile_at(task, begin, least(KEY_TILE, task.end - begin));
        for (int64_t t = 0; t < tile.count; t++)
            to_float(task.cache_dtype, (const char *)task.k + tile.at[t] * size, values + t * dim, dim);
        turned(values, dim, tile.count, dim, keys, KEY_TILE);
        for (int64_t t = 0; t < tile.count; t++) {
            to_float(task.cache_dtype, (const char *)task.v + tile.at[t] * size, values + t * width, dim);
            for (int64_t d = dim; d < width; d++) values[t * width + d] = 0;
        }
        const int64_t from = begin > task.first ? (begin - task.first) * task.group : 0; // those before see none of these
        float *first = p + from * KEY_TILE;
        product(rows - from, KEY_TILE, dim, {q + from * dim, dim, 1}, keys, KEY_TILE, first, KEY_TILE, false);
        for (int64_t r = from; r < rows; r++) {
            const int64_t seen = least(task.first + r / task.group + 1 - begin, tile.count);
            weights(p + r * KEY_TILE, seen, factor, most[r], total[r], out + r * width, width);
        }
        product(rows - from, width, tile.count, {first, KEY_TILE, 1}, values, width, out + from * width, width, true);
    }
    for (int64_t r = 0; r < rows; r++) {
        float *to = result_of(task, r);
        const float inverse = task.partial ? 1.f : 1.f / total[r];
        for (int64_t d = 0; d < dim; d++) to[d] = out[r * width + d] * inverse;
        if (task.partial) to[dim] = total[r], to[dim + 1] = most[r];
    }
}

// ---- few queries: all of them, of all heads, first meet a tile's keys, then its values, so that none waits for its own sums

// A run of a row: halves as their words have them, the even ones and the odd ones.
struct Run {
    vf even, odd;
};
INLINE Run run_of(const float *from) { return {load<vf>(from), load<vf>(from + L)}; }
INLINE Run run_of(const uint16_t *from) {
    const vu words = load<vu>(from);
    return {(vf)(words << 16), (vf)(words & 0xffff0000u)};
}

// Four vectors on the way to {sum a, sum b, sum c, sum d}.
#if LK_LANES == 16
typedef vf Four; // {sum a, ... sum d} of each quarter
INLINE Four four_of(const vf *x) {
    const vf ab = __builtin_shufflevector(x[0], x[1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                  __builtin_shufflevector(x[0], x[1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    const vf cd = __builtin_shufflevector(x[2], x[3], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                  __builtin_shufflevector(x[2], x[3], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    return __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
INLINE void put_sums(const Four (&four)[TOKENS / 4], float *out) {
    auto quarters = [](vf a, vf b) {
        return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    };
    store(out, quarters(quarters(four[0], four[1]), quarters(four[2], four[3])));
}
#else
typedef f4 Four;
INLINE Four four_of(const vf *x) { return sums(halved(x[0]), halved(x[1]), halved(x[2]), halved(x[3])); }
INLINE void put_sums(const Four (&four)[TOKENS / 4], float *out) { memcpy(out, four, sizeof four); }
#endif

// Products of R rows of q with some keys.
template <int R, class E>
INLINE void scores(const float *q, const E *const (&keys)[STEP], int64_t width, Four (*out)[TOKENS / 4], int64_t at) {
    constexpr bool FEW = R * STEP < 8; // sums, which would wait for themselves
    vf even[R][STEP] = {}, odd[R][STEP] = {};
    for (int64_t d = 0; d < width; d += RUN)
        for (int i = 0; i < STEP; i++) {
            const Run key = run_of(keys[i] + d);
            for (int r = 0; r < R; r++) {
                const float *query = q + r * width + d;
                vf &second = FEW ? odd[r][i] : even[r][i];
                even[r][i] += key.even * load<vf>(query);
                second += key.odd * load<vf>(query + L);
            }
        }
    for (int r = 0; r < R; r++) {
        for (int i = 0; i < STEP && FEW; i++) even[r][i] += odd[r][i];
        for (int i = 0; i < STEP / 4; i++) out[r][at + i] = four_of(even[r] + 4 * i);
    }
}

struct Weighed { // what a query has come to so far
    float most = -__builtin_inff();
    vf total = {};
};

// A query's scores, of which the first `seen` count, become weights; `out` is what has been weighed so far.
INLINE void soften(float *s, int64_t seen, float factor, int64_t width, Weighed &query, float *out) {
    for (int64_t t = seen > 0 ? seen : 0; t < TOKENS; t++) s[t] = -__builtin_inff();
    vf highest = load<vf>(s);
    for (int64_t t = L; t < TOKENS; t += L) highest = larger(highest, load<vf>(s + t));
    const float now = largest(highest) * factor;
    if (now > query.most) {
        const float shrink = power_of_two(all(query.most - now))[0];
        for (int64_t d = 0; d < width; d += L) store(out + d, load<vf>(out + d) * shrink);
        query.total *= shrink, query.most = now;
    }
    for (int64_t t = 0; t < TOKENS; t += L) {
        const vf e = power_of_two(load<vf>(s + t) * factor - query.most);
        store(s + t, e), query.total += e;
    }
}

// Adds to R rows of `out`, from `d` on, what some values weigh, V runs of dimensions at a time; returns how far it came.
template <int R, int V, class E>
INLINE int64_t weigh(const float *weight, const E *const (&values)[STEP], int64_t d, int64_t width, float *out) {
    for (; d + V * RUN <= width; d += V * RUN) {
        Run total[R][V];
        for (int r = 0; r < R; r++)
            for (int i = 0; i < V; i++) total[r][i] = run_of(out + r * width + d + i * RUN);
        for (int64_t t = 0; t < STEP; t++)
            for (int i = 0; i < V; i++) {
                const Run value = run_of(values[t] + d + i * RUN);
                for (int r = 0; r < R; r++) {
                    const float one = weight[r * TOKENS + t];
                    total[r][i].even += value.even * one, total[r][i].odd += value.odd * one;
                }
            }
        for (int r = 0; r < R; r++)
            for (int i = 0; i < V; i++) {
                float *to = out + r * width + d + i * RUN;
                store(to, total[r][i].even), store(to + L, total[r][i].odd);
            }
    }
    return d;
}

// One head's keys or values of some tokens: where they lie, or a copy with zeros up to `width`.
template <class E>
INLINE void rows_of(const Attention &task, const int64_t *at, const void *cache, int64_t head, int64_t width, E *copy,
                    const E *(&rows)[STEP]) {
    for (int64_t i = 0; i < STEP; i++) {
        rows[i] = (const E *)cache + head * task.head_stride + at[i];
        if (width == task.head_dim) continue;
        memcpy(copy + i * width, rows[i], (size_t)task.head_dim * sizeof(E));
        rows[i] = copy + i * width;
    }
}

// The same order for a row of `dim` floats that meet such rows, and back.
template <class E>
INLINE void into_runs(const float *x, int64_t dim, int64_t width, float *out) {
    float row[lk::MAX_HEAD_DIM + RUN];
    memcpy(row, x, (size_t)dim * sizeof(float));
    memset(row + dim, 0, (size_t)(width - dim) * sizeof(float));
    for (int64_t d = 0; d < width; d += RUN)
        for (int64_t i = 0; i < L; i++) {
            constexpr int64_t APART = sizeof(E) == 4 ? 1 : 2;
            out[d + i] = row[d + APART * i], out[d + L + i] = row[d + (APART == 1 ? L + i : 2 * i + 1)];
        }
}
template <class E>
INLINE void from_runs(const float *x, float factor, int64_t dim, int64_t width, float *out) {
    float row[lk::MAX_HEAD_DIM + RUN];
    for (int64_t d = 0; d < width; d += RUN)
        for (int64_t i = 0; i < L; i++) {
            constexpr int64_t APART = sizeof(E) == 4 ? 1 : 2;
            row[d + APART * i] = x[d + i] * factor, row[d + (APART == 1 ? L + i : 2 * i + 1)] = x[d + L + i] * factor;
        }
    memcpy(out, row, (size_t)dim * sizeof(float));
}

// Asks for a task's part of the cache in the order in which it lies there, token by token all keys and all values: that way
// a core gets half as much again out of memory as in the order in which heads meet them, and twice as much as in several
// streams side by side.
template <class E>
struct LookAhead {
    const Attention &task;
    int64_t row = 0; // bytes of a token's keys, and of its values, where the heads' lie side by side
    int64_t token;
    bool values = true;
    const char *from = nullptr, *end = nullptr;

    INLINE explicit LookAhead(const Attention &task) : task(task), token(task.begin - 1) {
        if (task.kv_heads > 1 && task.head_stride * task.kv_heads > task.token_stride) {
            token = task.end;
            return;
        }
        row = ((task.kv_heads - 1) * task.head_stride + task.head_dim) * (int64_t)sizeof(E);
        next_row();
    }
    INLINE void next_row() {
        values = !values, token += !values;
        if (token >= task.end) return;
        const int64_t at = place_of(task, token / task.block_size, token % task.block_size);
        from = (const char *)((const E *)(values ? task.v : task.k) + at);
        end = from + row;
    }
    INLINE void ask(int64_t lines) {
        while (lines > 0 && token < task.end) {
            const int64_t some = least(lines, (end - from + 63) / 64);
            for (int64_t i = 0; i < some; i++) __builtin_prefetch(from + 64 * i, 0, INTO);
            from += 64 * some, lines -= some;
            if (from >= end) next_row();
        }
    }
};

template <class E>
void attend_few(const Attention &task, float *scratch) {
    const int64_t dim = task.head_dim, width = (dim + RUN - 1) / RUN * RUN, heads = task.kv_heads, rows = task.rows;
    const float factor = LOG2E / __builtin_sqrtf((float)dim); // scores are kept in units of log 2
    float *q = scratch, *out = q + lk::MAX_QUERIES * lk::MAX_HEAD_DIM; // (heads, rows, width) both
    E *copy = (E *)(out + lk::MAX_QUERIES * lk::MAX_HEAD_DIM); // (STEP, width)
    alignas(64) float score[lk::MAX_QUERIES * TOKENS];
    Four found[lk::MAX_QUERIES][TOKENS / 4];
    Weighed queries[lk::MAX_QUERIES];
    for (int64_t i = 0; i < heads * rows; i++) into_runs<E>(query_of(task, i, task.q, task.q_stride), dim, width, q + i * width);
    memset(out, 0, (size_t)(heads * rows * width) * sizeof(float));
    memset(found, 0, (size_t)(heads * rows) * sizeof found[0]); // of tokens that are not there nothing is found
    memset(copy, 0, (size_t)(STEP * width) * sizeof(E));
    LookAhead<E> ahead(task);
    const int64_t lines = (STEP * ahead.row / heads + 63) / 64; // that are used between two looks
    ahead.ask((TOKENS * ahead.row + LEAD) / 64); // half a tile more: all its keys are used before the first of its values
    for (int64_t begin = task.begin; begin < task.end; begin += TOKENS) {
        const int64_t count = least(TOKENS, task.end - begin);
        Tile tile = tile_at(task, begin, count);
        for (int64_t t = count; t % STEP; t++) tile.at[t] = tile.at[count - 1]; // it is read again, and weighs nothing
        const E *row[STEP];
        for (int64_t t = 0; t < count; t += STEP)
            for (int64_t head = 0; head < heads; head++) {
                ahead.ask(lines);
                rows_of(task, tile.at + t, task.k, head, width, copy, row);
                int64_t i = head * rows;
                for (; i + 2 <= (head + 1) * rows; i += 2) scores<2>(q + i * width, row, width, found + i, t / 4);
                if (i < (head + 1) * rows) scores<1>(q + i * width, row, width, found + i, t / 4);
            }
        for (int64_t i = 0; i < heads * rows; i++) {
            const int64_t query = rows == 1 ? 0 : i % rows / task.group;
            const int64_t seen = least(task.first + query + 1 - begin, count); // may be none
            put_sums(found[i], score + i * TOKENS);
            soften(score + i * TOKENS, seen, factor, width, queries[i], out + i * width);
        }
        for (int64_t t = 0; t < count; t += STEP)
            for (int64_t head = 0; head < heads; head++) {
                ahead.ask(lines);
                rows_of(task, tile.at + t, task.v, head, width, copy, row);
                const float *weight = score + t;
                int64_t i = head * rows;
                for (; i + 4 <= (head + 1) * rows; i += 4) weigh<4, 1>(weight + i * TOKENS, row, 0, width, out + i * width);
                for (; i < (head + 1) * rows; i++) {
                    int64_t d = weigh<1, 4>(weight + i * TOKENS, row, 0, width, out + i * width);
                    d = weigh<1, 2>(weight + i * TOKENS, row, d, width, out + i * width);
                    weigh<1, 1>(weight + i * TOKENS, row, d, width, out + i * width);
                }
            }
    }
    for (int64_t i = 0; i < heads * rows; i++) {
        const float total = sum(queries[i].total);
        float *to = result_of(task, i);
        from_runs<E>(out + i * width, task.partial ? 1.f : 1.f / total, dim, width, to);
        if (task.partial) to[dim] = total, to[dim + 1] = queries[i].most;
    }
}

void attend(const Attention &task, float *scratch) {
    if (task.kv_heads == 1 && task.rows >= MANY_QUERIES) return attend_many(task, scratch);
    if (task.cache_dtype == LK_FLOAT32) return attend_few<float>(task, scratch);
    attend_few<uint16_t>(task, scratch);
}

} // namespace
