// The CPU's inference operations one by one against sums in double: odd sizes, strides, both types, several threads, under the
// instruction set that is named. test_cpu.cpp has the products of every weight format and the whole decoder.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "numbers.h"

static void rms_norm(lk_handle *handle, lk_dtype dtype, int64_t rows, int64_t width, int64_t gap, bool add) {
    Array x(dtype, (rows - 1) * (width + gap) + width), residual(dtype, (rows - 1) * (width + 2 * gap) + width);
    Array weight(dtype, width), out(dtype, rows * width, UNTOUCHED), sum(dtype, rows * width, UNTOUCHED);
    lk_rms_norm_args args{};
    args.dtype = dtype, args.rows = rows, args.width = width, args.eps = 1e-5f;
    args.x = x.data(), args.x_stride = width + gap, args.weight = weight.data(), args.out = out.data();
    if (add) args.residual = residual.data(), args.residual_stride = width + 2 * gap, args.sum = sum.data();
    CHECK(lk_rms_norm(handle, &args, nullptr) == LK_OK);
    for (int64_t r = 0; r < rows; r++) {
        // What is normed is the sum as it was written, rounded.
        auto value = [&](int64_t i) { return add ? sum[r * width + i] : x[r * (width + gap) + i]; };
        double squares = 0;
        for (int64_t i = 0; i < width; i++) squares += value(i) * value(i);
        const double factor = 1 / std::sqrt(squares / (double)width + 1e-5);
        for (int64_t i = 0; i < width; i++) {
            CHECK(near(out[r * width + i], value(i) * factor * weight[i], 0, dtype, 2)); // the first before the weight
            const double one = x[r * (width + gap) + i], two = add ? residual[r * (width + 2 * gap) + i] : 0;
            CHECK(!add || near(sum[r * width + i], one + two, 0, dtype));
        }
    }
}

static void rope(lk_handle *handle, lk_dtype dtype, int64_t tokens, int64_t heads, int64_t dim, int64_t gap, bool in_place) {
    const int64_t head = dim + gap, token = heads * head + gap;
    Array x(dtype, tokens * token), cos(LK_FLOAT32, tokens * dim / 2), sin(LK_FLOAT32, tokens * dim / 2);
    const Array before = x;
    Array out(dtype, tokens * heads * dim, UNTOUCHED);
    lk_rope_args args{};
    args.dtype = dtype, args.tokens = tokens, args.heads = heads, args.head_dim = dim, args.x = x.data();
    args.x_token_stride = token, args.x_head_stride = head, args.cos = cos.wide.data(), args.sin = sin.wide.data();
    args.out = out.data();
    if (in_place) args.out = x.data(), args.out_token_stride = token, args.out_head_stride = head;
    CHECK(lk_rope(handle, &args, nullptr) == LK_OK);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t i = 0; i < dim; i++) {
                const int64_t from = t * token + h * head, j = i % (dim / 2);
                const double c = cos[t * dim / 2 + j], s = sin[t * dim / 2 + j];
                const double a = before[from + j], b = before[from + j + dim / 2];
                const double exact = i < dim / 2 ? a * c - b * s : b * c + a * s;
                const double found = in_place ? x[from + i] : out[(t * heads + h) * dim + i];
                CHECK(near(found, exact, std::fabs(a) + std::fabs(b), dtype));
            }
    for (int64_t t = 0; in_place && t < tokens; t++) // between the rows nothing changes
        for (int64_t i = 0; i < gap; i++) CHECK(x[t * token + heads * head + i] == before[t * token + heads * head + i]);
}

static void swiglu(lk_handle *handle, lk_dtype dtype, int64_t rows, int64_t inner, int64_t gap) {
    const int64_t stride = 2 * inner + gap;
    Array both(dtype, (rows - 1) * stride + 2 * inner), out(dtype, rows * inner, UNTOUCHED);
    lk_swiglu_args args{};
    args.dtype = dtype, args.rows = rows, args.inner = inner, args.gate_up = both.data(), args.gate_up_stride = stride;
    args.out = out.data();
    CHECK(lk_swiglu(handle, &args, nullptr) == LK_OK);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < inner; i++) {
            const double gate = both[r * stride + i], up = both[r * stride + inner + i];
            CHECK(near(out[r * inner + i], gate / (1 + std::exp(-gate)) * up, 0, dtype));
        }
}

static void project_splice(lk_handle *handle, lk_dtype dtype, int64_t images, int64_t image_patches, int64_t texts,
                           int64_t channels, int64_t width, int64_t gap, bool with_bias) {
    const int64_t patches = images * image_patches, tokens = patches + texts, vocabulary = 7;
    const int64_t patch = channels + gap, image = image_patches * patch + 3 * gap; // as if a class token lay between
    Array features(dtype, images * image), weight(dtype, width * channels), bias(dtype, width);
    Array embedding(dtype, vocabulary * width), out(dtype, tokens * width, UNTOUCHED);
    std::vector<int64_t> ids((size_t)tokens);
    std::vector<int32_t> places((size_t)tokens);
    for (int64_t i = 0; i < tokens; i++) places[(size_t)i] = (int32_t)i, ids[(size_t)i] = (int64_t)(generator() % vocabulary);
    std::shuffle(places.begin(), places.end(), generator);
    for (int64_t p = 0; p < patches; p++) ids[(size_t)places[(size_t)p]] = -200; // never looked up
    lk_project_splice_args args{};
    args.dtype = dtype, args.images = images, args.image_patches = image_patches, args.texts = texts;
    args.channels = channels, args.width = width, args.vocabulary = vocabulary, args.features = features.data();
    args.image_stride = image, args.patch_stride = patch, args.weight = weight.data();
    args.bias = with_bias ? bias.data() : nullptr, args.embedding = embedding.data(), args.input_ids = ids.data();
    args.image_rows = places.data(), args.text_rows = places.data() + patches, args.out = out.data();
    CHECK(lk_project_splice(handle, &args, nullptr) == LK_OK);
    for (int64_t p = 0; p < patches; p++)
        for (int64_t d = 0; d < width; d++) {
            double exact = with_bias ? bias[d] : 0, size = std::fabs(exact);
            for (int64_t c = 0; c < channels; c++) {
                const double one = features[p / image_patches * image + p % image_patches * patch + c] * weight[d * channels + c];
                exact += one, size += std::fabs(one);
            }
            CHECK(near(out[places[(size_t)p] * width + d], exact, size, dtype));
        }
    for (int64_t i = patches; i < tokens; i++)
        for (int64_t d = 0; d < width; d++)
            CHECK(out[places[(size_t)i] * width + d] == embedding[ids[(size_t)places[(size_t)i]] * width + d]);
}

// Keys and values stored token by token in blocks that lie backwards and apart, then attended to.
struct Cache {
    static constexpr int64_t BLOCK = 4, BLOCKS = 48, TABLE = 25;
    Cache(lk_dtype dtype, int64_t heads, int64_t dim, int64_t gap)
        : heads(heads), dim(dim), head(dim + gap), token(heads * head + gap), block(BLOCK * token + gap),
          k(dtype, BLOCKS * block, UNTOUCHED), v(dtype, BLOCKS * block, UNTOUCHED) {}
    int64_t heads, dim, head, token, block;
    Array k, v;
    int64_t at(int64_t slot, int64_t h) const { return slot / BLOCK * block + slot % BLOCK * token + h * head; }
};

static void store_and_attend(lk_handle *handle, lk_dtype dtype, int64_t kv_heads, int64_t group, int64_t dim, int64_t gap) {
    // Decoding, with keys in several parts, in one and in parts again, and a chunk of a prompt.
    constexpr int SEQUENCES = 5;
    const int64_t contexts[SEQUENCES] = {99, 1, 18, 23, 40}, queries[SEQUENCES] = {1, 1, 5, 1, 1};
    const int64_t tokens = 9, heads = kv_heads * group;
    Cache cache(dtype, kv_heads, dim, gap);
    std::vector<int32_t> table(SEQUENCES * Cache::TABLE, -1), lengths, starts{0};
    std::vector<int64_t> slots;
    int32_t next = Cache::BLOCKS - 1;
    for (int s = 0; s < SEQUENCES; s++) {
        for (int64_t t = 0; t < contexts[s]; t++) {
            if (t % Cache::BLOCK == 0) table[(size_t)(s * Cache::TABLE + t / Cache::BLOCK)] = next--;
            slots.push_back(table[(size_t)(s * Cache::TABLE + t / Cache::BLOCK)] * Cache::BLOCK + t % Cache::BLOCK);
        }
        lengths.push_back((int32_t)contexts[s]), starts.push_back(starts.back() + (int32_t)queries[s]);
    }
    const int64_t all = (int64_t)slots.size(), kv_token = kv_heads * (dim + gap);
    Array k(dtype, all * kv_token), v(dtype, all * kv_token);
    slots.push_back(-1); // a token that is not stored
    Array more_k(dtype, (all + 1) * kv_token), more_v(dtype, (all + 1) * kv_token);
    lk_store_kv_args store{};
    store.dtype = store.cache_dtype = dtype, store.tokens = all + 1, store.kv_heads = kv_heads, store.head_dim = dim;
    store.block_size = Cache::BLOCK, store.k = more_k.data(), store.v = more_v.data();
    store.token_stride = kv_token, store.head_stride = dim + gap, store.k_cache = cache.k.data(), store.v_cache = cache.v.data();
    store.cache_block_stride = cache.block, store.cache_token_stride = cache.token, store.cache_head_stride = cache.head;
    store.slots = slots.data();
    CHECK(lk_store_kv(handle, &store, nullptr) == LK_OK);
    int64_t touched = 0;
    for (int64_t i = 0; i < Cache::BLOCKS * cache.block; i++) touched += cache.k[i] != UNTOUCHED;
    CHECK(touched == all * kv_heads * dim);
    for (int64_t t = 0; t < all; t++)
        for (int64_t h = 0; h < kv_heads; h++)
            for (int64_t i = 0; i < dim; i++) {
                CHECK(cache.k[cache.at(slots[(size_t)t], h) + i] == more_k[t * kv_token + h * (dim + gap) + i]);
                CHECK(cache.v[cache.at(slots[(size_t)t], h) + i] == more_v[t * kv_token + h * (dim + gap) + i]);
            }

    const int64_t q_head = dim + gap, q_token = heads * q_head + gap;
    Array q(dtype, tokens * q_token), out(dtype, tokens * heads * dim, UNTOUCHED);
    lk_paged_attention_args args{};
    args.dtype = args.cache_dtype = dtype, args.tokens = tokens, args.sequences = SEQUENCES, args.heads = heads;
    args.kv_heads = kv_heads, args.head_dim = dim, args.block_size = Cache::BLOCK, args.max_query = 5, args.q = q.data();
    args.q_token_stride = q_token, args.q_head_stride = q_head, args.k_cache = cache.k.data(), args.v_cache = cache.v.data();
    args.cache_block_stride = cache.block, args.cache_token_stride = cache.token, args.cache_head_stride = cache.head;
    args.block_table = table.data(), args.table_stride = Cache::TABLE, args.context_lens = lengths.data();
    args.query_start = starts.data(), args.out = out.data();
    CHECK(lk_paged_attention(handle, &args, nullptr) == LK_OK);
    int64_t first = 0; // of the sequence's slots
    for (int s = 0, t = 0; s < SEQUENCES; first += contexts[s++])
        for (int64_t i = 0; i < queries[s]; i++, t++)
            for (int64_t h = 0; h < heads; h++) {
                const int64_t seen = contexts[s] - queries[s] + i + 1;
                std::vector<double> weights;
                double most = -1e300, total = 0;
                for (int64_t u = 0; u < seen; u++) {
                    double score = 0;
                    for (int64_t d = 0; d < dim; d++)
                        score += q[t * q_token + h * q_head + d] * cache.k[cache.at(slots[(size_t)(first + u)], h / group) + d];
                    weights.push_back(score / std::sqrt((double)dim)), most = std::fmax(most, weights.back());
                }
                for (double &w : weights) total += w = std::exp(w - most);
                for (int64_t d = 0; d < dim; d++) {
                    double exact = 0, size = 0;
                    for (int64_t u = 0; u < seen; u++) {
                        const double one = weights[(size_t)u] / total * cache.v[cache.at(slots[(size_t)(first + u)], h / group) + d];
                        exact += one, size += std::fabs(one);
                    }
                    CHECK(near(out[(t * heads + h) * dim + d], exact, 4 * size, dtype));
                }
            }
}

// Tokens drawn by the rules that llava_kernels/sample.py states, once more in doubles: sorted, cut off, and raced.
struct Rules {
    double temperature, top_p, min_p, repetition, presence, frequency;
    int top_k;
};

static double race_time(int64_t seed, int64_t position, uint32_t token) {
    auto mixed = [](uint32_t x) {
        x = (x ^ (x >> 16)) * 0x85EBCA6Bu, x = (x ^ (x >> 13)) * 0xC2B2AE35u;
        return x ^ (x >> 16);
    };
    const uint32_t low = (uint32_t)seed, high = (uint32_t)((uint64_t)seed >> 32), place = (uint32_t)position;
    const uint32_t first = mixed(mixed(mixed(low ^ 0x243F6A88u) ^ high) ^ place);
    const uint32_t second = mixed(mixed(mixed(place ^ 0x13198A2Eu) ^ low) ^ high);
    return -std::log1p(-((mixed(mixed(token + first) ^ second) >> 1) * 0x1p-31 + 0x1p-32));
}

static void check_draw(const float *logits, const int32_t *counts, const uint8_t *in_prompt, int64_t vocabulary, Rules rules,
                       int64_t seed, int64_t position, int64_t found, float logprob) {
    std::vector<double> x(logits, logits + vocabulary);
    double most = -INFINITY, total = 0, mass = 0, added = 0, best = 0;
    for (double value : x) most = std::fmax(most, value);
    for (double value : x) total += std::exp(value - most);
    CHECK(found >= 0 && found < vocabulary && std::fabs(logits[found] - most - std::log(total) - logprob) < 1e-5 * (1 - logprob));
    for (int64_t i = 0; i < vocabulary; i++) {
        if (counts[i] > 0 || in_prompt[i]) x[(size_t)i] *= x[(size_t)i] > 0 ? 1 / rules.repetition : rules.repetition;
        if (counts[i] > 0) x[(size_t)i] -= rules.presence + rules.frequency * counts[i];
    }
    most = -INFINITY;
    for (double value : x) most = std::fmax(most, value);
    if (rules.temperature < 1e-5) {
        CHECK(x[(size_t)found] >= most - 1e-6 * (1 + std::fabs(most)));
        return;
    }
    std::vector<double> weights, sorted;
    for (double value : x) weights.push_back(std::exp((value - most) / rules.temperature));
    sorted = weights, std::sort(sorted.rbegin(), sorted.rend());
    if (rules.top_k > 0 && rules.top_k < vocabulary)
        while (sorted.back() < sorted[(size_t)rules.top_k - 1]) sorted.pop_back();
    double cut = sorted.back();
    if (rules.top_p < 1) {
        for (double w : sorted) mass += w;
        size_t n = 0;
        while (n == 0 || (n < sorted.size() && added < rules.top_p * mass * (1 - 1e-6))) added += sorted[n++];
        cut = sorted[n - 1];
    }
    cut = std::fmax(cut, rules.min_p) * (1 - 1e-4);
    for (int64_t i = 0; i < vocabulary; i++)
        if (weights[(size_t)i] >= cut) best = std::fmax(best, weights[(size_t)i] / race_time(seed, position, (uint32_t)i));
    CHECK(weights[(size_t)found] >= cut);
    CHECK(weights[(size_t)found] / race_time(seed, position, (uint32_t)found) >= best * (1 - 1e-4));
}

static void draws(lk_handle *handle, int64_t rows, int64_t vocabulary, int64_t gap) {
    const Rules rules[] = {{1, 1, 0, 1, 0, 0, 0}, {0.7, 1, 0, 1, 0, 0, 3}, {1.5, 0.8, 0, 1.3, 0.2, 0.1, 0}, {0, 0.5, 0, 1.3, 0, 0, 1},
                           {0.9, 0.9, 0.1, 1, 0, 0, 7}};
    const int64_t stride = vocabulary + gap;
    Array logits(LK_FLOAT32, rows * stride), noise(LK_FLOAT32, 2 * rows * stride);
    std::vector<int32_t> counts, top_k;
    std::vector<uint8_t> in_prompt;
    std::vector<float> of[6], logprobs((size_t)rows);
    std::vector<int64_t> seeds, positions, table_rows, ids((size_t)rows, -1);
    for (int64_t i = 0; i < rows * stride; i++) counts.push_back(noise[2 * i] > 1 ? 2 : 0), in_prompt.push_back(noise[2 * i + 1] > 1);
    for (int64_t r = 0; r < rows; r++) {
        const Rules &one = rules[r % 5];
        const double values[] = {one.temperature, one.top_p, one.min_p, one.repetition, one.presence, one.frequency};
        for (int i = 0; i < 6; i++) of[i].push_back((float)values[i]);
        top_k.push_back(one.top_k), seeds.push_back(r * 0x123456789abLL - 5), positions.push_back(r + 3), table_rows.push_back(rows - 1 - r);
    }
    lk_sample_args args{};
    args.rows = rows, args.vocabulary = vocabulary, args.logits = (const float *)logits.data(), args.logits_stride = stride;
    args.seeds = seeds.data(), args.positions = positions.data(), args.temperature = of[0].data(), args.top_k = top_k.data();
    args.top_p = of[1].data(), args.min_p = of[2].data(), args.repetition_penalty = of[3].data();
    args.presence_penalty = of[4].data(), args.frequency_penalty = of[5].data(), args.ids = ids.data(), args.logprobs = logprobs.data();
    CHECK(lk_sample(handle, &args) == LK_INVALID_ARGUMENT); // no counts
    args.counts = counts.data(), args.counts_stride = stride, args.in_prompt = in_prompt.data(), args.in_prompt_stride = stride;
    args.table_rows = table_rows.data();
    CHECK(lk_sample(handle, &args) == LK_OK);
    for (int64_t r = 0; r < rows; r++) {
        Rules one = rules[r % 5];
        one.temperature = of[0][(size_t)r], one.top_p = of[1][(size_t)r], one.min_p = of[2][(size_t)r];
        const int64_t table = table_rows[(size_t)r] * stride;
        check_draw(args.logits + r * stride, counts.data() + table, in_prompt.data() + table, vocabulary, one, seeds[(size_t)r],
                   positions[(size_t)r], ids[(size_t)r], logprobs[(size_t)r]);
    }
    std::vector<float> none((size_t)vocabulary, -INFINITY);
    lk_sample_args nothing{};
    nothing.rows = 1, nothing.vocabulary = vocabulary, nothing.logits = none.data(), nothing.seeds = seeds.data();
    nothing.positions = positions.data(), nothing.ids = ids.data(), nothing.logprobs = logprobs.data();
    CHECK(lk_sample(handle, &nothing) == LK_OK && ids[0] == 0 && std::isnan(logprobs[0]));
    none.back() = NAN, none.front() = 1e38f;
    CHECK(lk_sample(handle, &nothing) == LK_OK && ids[0] == 0 && logprobs[0] == 0);
}

// x and out whose rows lie apart, in both types; nothing between the rows is written.
static void strided_linear(lk_handle *handle, lk_dtype dtype, int64_t rows, int64_t out, int64_t in) {
    const int64_t gap = 3;
    Array x(dtype, (rows - 1) * (in + gap) + in), weight(LK_BFLOAT16, (out - 1) * (in + gap) + in), bias(dtype, out);
    Array y(dtype, rows * (out + gap), UNTOUCHED);
    lk_linear_args args{};
    args.dtype = dtype, args.rows = rows, args.x = x.data(), args.x_stride = in + gap, args.bias = bias.data();
    args.weight.format = LK_WEIGHT_BFLOAT16, args.weight.out_features = out, args.weight.in_features = in;
    args.weight.data = weight.data(), args.weight.row_stride = in + gap, args.out = y.data(), args.out_stride = out + gap;
    CHECK(lk_linear(handle, &args, nullptr) == LK_OK);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t n = 0; n < out; n++) {
            double exact = bias[n], size = std::fabs(exact);
            for (int64_t c = 0; c < in; c++) {
                const double one = x[r * (in + gap) + c] * weight[n * (in + gap) + c];
                exact += one, size += std::fabs(one);
            }
            CHECK(near(y[r * (out + gap) + n], exact, size, dtype));
        }
        for (int64_t i = 0; i < gap; i++) CHECK(y[r * (out + gap) + out + i] == UNTOUCHED);
    }
}

int main(int count, char **words) {
    const char *name = count > 1 ? words[1] : "portable";
    lk_handle *handle;
    CHECK(lk_create(&handle, LK_CPU) == LK_OK);
    if (lk_set_instructions(handle, name) != LK_OK) return std::puts(lk_last_error(handle)), lk_destroy(handle), 77;
    for (int threads : {1, 3})
        for (lk_dtype dtype : {LK_FLOAT32, LK_BFLOAT16})
            for (int64_t gap : {0, 5}) {
                CHECK(lk_set_threads(handle, threads) == LK_OK);
                for (int64_t width : {1, 7, 16, 67})
                    for (int64_t rows : {1, 3}) {
                        rms_norm(handle, dtype, rows, width, gap, false), rms_norm(handle, dtype, rows, width, gap, true);
                        swiglu(handle, dtype, rows, width, gap);
                    }
                for (int64_t dim : {2, 30, 64}) rope(handle, dtype, 3, 2, dim, gap, false), rope(handle, dtype, 3, 2, dim, gap, true);
                project_splice(handle, dtype, 1, 5, 4, 9, 50, gap, true);
                project_splice(handle, dtype, 3, 30, 2, 33, 101, gap, false); // more rows than a task takes
                project_splice(handle, dtype, 0, 0, 3, 1, 4, gap, true);
                project_splice(handle, dtype, 2, 3, 0, 1, 4, gap, true);
                if (gap) project_splice(handle, dtype, 2, 600, 1, 3, 5, gap, true); // more than are prepared at once
                for (int64_t dim : {2, 18, 64}) store_and_attend(handle, dtype, 1, 1, dim, gap), store_and_attend(handle, dtype, 2, 3, dim, gap);
                store_and_attend(handle, dtype, 7, 9, 18, gap); // more queries than a task takes
                store_and_attend(handle, dtype, 1, 9, 18, gap);
                for (int64_t rows : {1, 2, 5, 70}) strided_linear(handle, dtype, rows, 50, 37);
            }
    for (int threads : {1, 3}) {
        CHECK(lk_set_threads(handle, threads) == LK_OK);
        for (int64_t vocabulary : {1, 3, 16, 50, 1001})
            for (int64_t gap : {0, 5}) draws(handle, 1, vocabulary, gap), draws(handle, 33, vocabulary, gap);
    }
    lk_destroy(handle);
    if (failures) std::printf("%d failures\n", failures);
    return failures != 0;
}
