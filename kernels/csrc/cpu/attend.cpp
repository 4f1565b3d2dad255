// Attention of a step, shared out among threads. A sequence that decodes has one query for all of its keys: these are shared
// out, in parts that are put together afterwards (Flash-Decoding, Dao et al. 2023), and a task takes all heads of its keys,
// which lie side by side. Memory is then read from front to back; head by head it gives a third as much. How keys are shared
// out does not depend on the number of threads; how many heads a task takes does.
#include <algorithm>
#include <cmath>
#include <vector>

#include "handle.h"

namespace lk {

namespace {

constexpr int64_t LEAST_KEYS = 32, KEY_PARTS = 16, KEY_UNIT = 16;

// Queries that a task takes for one head of keys (most: PROMPT_QUERIES), or heads of keys for one query (MAX_QUERIES).
int64_t most_of(const PagedStep &step, int64_t most) { return std::max(most / (step.heads / step.kv_heads), int64_t{1}); }

struct Part {
    int64_t sequence, query, queries; // of the sequence, the first and how many
    int64_t head, heads;              // of keys
    int64_t begin, end;               // of the keys
    int64_t partial;                  // which, where the sequence's keys are in several parts; else -1
};

int64_t queries_of(const PagedStep &step, int64_t s) { return step.query_start[s + 1] - step.query_start[s]; }

// Keys of one part: a sixteenth of those that all decoding sequences have, so that long ones hold up nobody.
int64_t keys_of_part(const PagedStep &step) {
    int64_t keys = 0;
    for (int64_t s = 0; s < step.sequences; s++)
        if (queries_of(step, s) == 1) keys += step.context_lens[s];
    return std::max(cdiv(cdiv(keys, KEY_PARTS), KEY_UNIT) * KEY_UNIT, LEAST_KEYS);
}

struct Split {
    int64_t sequence, first, count; // its partials
};

struct Parts {
    std::vector<Part> list; // the pool begins with the last
    std::vector<Split> splits;
    int64_t partials = 0;
};

// Runs of queries of one head each, of the same length as far as they can be: later ones see more keys.
void add_prompt(const PagedStep &step, int64_t s, Parts &parts) {
    const int64_t queries = queries_of(step, s), before = step.context_lens[s] - queries;
    const int64_t run = queries ? cdiv(queries, cdiv(queries, most_of(step, PROMPT_QUERIES))) : 1;
    for (int64_t first = 0; first < queries; first += run)
        for (int64_t head = 0; head < step.kv_heads; head++) {
            const int64_t count = std::min(run, queries - first);
            parts.list.push_back({s, first, count, head, 1, 0, before + first + count, -1});
        }
}

void add_decode(const PagedStep &step, int64_t s, int64_t keys, int64_t heads, Parts &parts) {
    const int64_t context = step.context_lens[s], count = cdiv(context, keys);
    if (count > 1) parts.splits.push_back({s, parts.partials, count});
    for (int64_t i = 0; i < count; i++) {
        const int64_t partial = count > 1 ? parts.partials++ : -1;
        for (int64_t head = 0; head < step.kv_heads; head += heads)
            parts.list.push_back({s, 0, 1, head, std::min(heads, step.kv_heads - head), i * keys,
                                  std::min((i + 1) * keys, context), partial});
    }
}

// Heads of keys that a task takes of one of `runs` of keys: as many as it can, for it then reads the cache from front to
// back, but for where threads would be left without work at the end.
int64_t heads_of_part(const PagedStep &step, int64_t runs, int64_t threads) {
    const int64_t least = cdiv(step.kv_heads, most_of(step, MAX_QUERIES));
    const int64_t most = runs ? std::clamp(cdiv(4 * threads, runs), least, step.kv_heads) : least;
    int64_t heads = 0;
    for (int64_t shares = least; shares <= most; shares++) {
        heads = cdiv(step.kv_heads, shares);
        const int64_t tasks = runs * cdiv(step.kv_heads, heads);
        if (4 * cdiv(tasks, threads) * threads <= 5 * tasks) break; // four fifths of the threads' time at least
    }
    return heads;
}

Parts parts_of(const PagedStep &step, int64_t threads) {
    const int64_t keys = keys_of_part(step);
    int64_t runs = 0; // of keys that decoding sequences have
    for (int64_t s = 0; s < step.sequences; s++)
        if (queries_of(step, s) == 1) runs += cdiv(step.context_lens[s], keys);
    const int64_t heads = heads_of_part(step, runs, threads);
    Parts parts;
    for (int64_t s = 0; s < step.sequences; s++) {
        if (queries_of(step, s) == 1) add_decode(step, s, keys, heads, parts);
        else add_prompt(step, s, parts);
    }
    return parts;
}

// out (head_dim,) of one head, from `count` partials that lie `apart` floats from each other.
void put_together(const float *partial, int64_t count, int64_t apart, int64_t dim, float *out) {
    float most = -INFINITY, total = 0;
    for (int64_t i = 0; i < count; i++) most = std::max(most, partial[i * apart + dim + 1]);
    std::fill_n(out, dim, 0.f);
    for (int64_t i = 0; i < count; i++) {
        const float *one = partial + i * apart, factor = std::exp2(one[dim + 1] - most);
        total += factor * one[dim];
        for (int64_t d = 0; d < dim; d++) out[d] += factor * one[d];
    }
    for (int64_t d = 0; d < dim; d++) out[d] /= total;
}

} // namespace

void attend(lk_cpu &cpu, const PagedStep &step, const void *k_cache, const void *v_cache, const float *q,
            int64_t q_stride, float *out) {
    const int64_t group = step.heads / step.kv_heads, size = size_of(step.cache_dtype);
    const int64_t width = step.heads * step.head_dim, row = attention_partial(step.head_dim), apart = step.heads * row;
    const Parts parts = parts_of(step, cpu.pool->threads());
    float *scratch = cpu.scratch.at_least(ATTEND_SCRATCH * cpu.pool->threads());
    float *partials = cpu.partials.at_least(parts.partials * apart);
    cpu.pool->each((int64_t)parts.list.size(), [&](int64_t task, int thread) {
        const Part &part = parts.list[(size_t)task];
        const int64_t s = part.sequence, token = step.query_start[s] + part.query;
        const int64_t to_head = part.head * step.head_stride * size, column = part.head * group * step.head_dim;
        cpu.isa->attend({.kv_heads = part.heads, .rows = part.queries * group, .group = group, .head_dim = step.head_dim,
                         .q = q + token * q_stride + column, .q_stride = q_stride, .out = out + token * width + column,
                         .out_stride = width, .first = step.context_lens[s] - queries_of(step, s) + part.query,
                         .begin = part.begin, .end = part.end,
                         .partial = part.partial < 0 ? nullptr : partials + part.partial * apart + part.head * group * row,
                         .cache_dtype = step.cache_dtype, .k = static_cast<const char *>(k_cache) + to_head,
                         .v = static_cast<const char *>(v_cache) + to_head, .block_stride = step.block_stride,
                         .token_stride = step.token_stride, .head_stride = step.head_stride, .block_size = step.block_size,
                         .table = step.block_table + s * step.table_stride},
                        scratch + thread * ATTEND_SCRATCH);
    });
    for (const Split &split : parts.splits)
        for (int64_t head = 0; head < step.heads; head++)
            put_together(partials + split.first * apart + head * row, split.count, apart, step.head_dim,
                         out + step.query_start[split.sequence] * width + head * step.head_dim);
}

} // namespace lk
