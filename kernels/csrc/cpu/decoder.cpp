// All layers of the decoder in one call. A layer is five jobs of the pool; what needs no other thread's results between
// two of them is done in the same task: a head's part of QKV is turned and stored by the task that has multiplied it.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "handle.h"

using namespace lk;

struct lk_decoder {
    struct Best { // of a row's logits
        float value;
        int64_t at;
    };
    lk_handle *handle;
    lk_decoder_args args;
    std::vector<lk_layer> layers;
    std::vector<float> norms; // (2 layers + 1, width)
    PanelBuffer panel, inner, rough;
    Buffer<float> stream, qkv, attended, gated, scratch, logits, floors;
    Buffer<Best> bests;
    struct { // of lk_decoder_next
        Buffer<char> x;
        Buffer<float> hidden;
        Buffer<int32_t> positions, block_table, context_lens, query_start;
        Buffer<int64_t> slots;
    } next;

    const float *norm(int64_t i) const { return norms.data() + i * args.width; }
    int64_t group_heads() const { return args.heads + 2 * args.kv_heads; }
};

namespace {

// One head's part of a token's QKV, turned and put where it belongs.
void place_head(const lk_decoder &decoder, const lk_cpu &cpu, const lk_layer &layer, const lk_step_args &step, int64_t token,
                int64_t head, float *x, float *q) {
    const lk_decoder_args &args = decoder.args;
    const int64_t dim = args.head_dim, at = step.positions[token] * dim / 2, slot = step.slots[token];
    const bool query = head < args.heads, key = !query && head < args.heads + args.kv_heads;
    if (query || key) cpu.isa->turn(x, dim, args.cos + at, args.sin + at);
    if (query) {
        std::memcpy(q + (token * args.heads + head) * dim, x, dim * sizeof(float));
    } else if (slot >= 0) {
        const int64_t kv_head = head - args.heads - (key ? 0 : args.kv_heads);
        const int64_t to = slot / args.block_size * args.cache_block_stride +
                           slot % args.block_size * args.cache_token_stride + kv_head * args.cache_head_stride;
        char *cache = static_cast<char *>(key ? layer.k_cache : layer.v_cache);
        cpu.isa->from_float(args.cache_dtype, x, cache + to * size_of(args.cache_dtype), dim);
    }
}

// The QKV product, each head's part of which the task that has multiplied it puts where it belongs.
void project_heads(lk_decoder &decoder, lk_cpu &cpu, const lk_layer &layer, const Panel &panel, const lk_step_args &step,
                   float *q) {
    const int64_t dim = decoder.args.head_dim, heads = decoder.group_heads();
    constexpr int64_t ROOM = ROW_BLOCK * MAX_HEAD_DIM;
    float *scratch = decoder.scratch.at_least(ROOM * cpu.pool->threads());
    share_product(cpu, step.tokens, heads * dim, dim, [&](int64_t first, int64_t rows, int64_t begin, int64_t count, int thread) {
        float *some = scratch + thread * ROOM;
        const int64_t part = ROOM / (rows * dim) * dim; // whole heads, as many as there is room for
        for (int64_t n = begin; n < begin + count; n += part) {
            const int64_t width = std::min(part, begin + count - n);
            cpu.isa->products(layer.qkv, panel, first, rows, n, width, some, width, false);
            for (int64_t t = first; t < first + rows; t++)
                for (int64_t i = 0; i < width; i += dim)
                    place_head(decoder, cpu, layer, step, t, (n + i) / dim, some + (t - first) * width + i, q);
        }
    });
}

void add_product(lk_cpu &cpu, const lk_weight &weight, const Panel &panel, int64_t rows, float *x) {
    const int64_t width = weight.out_features;
    share_product(cpu, rows, width, unit_of(panel, 12), [&](int64_t row, int64_t count, int64_t first, int64_t features, int) {
        cpu.isa->products(weight, panel, row, count, first, features, x + row * width + first, width, true);
    });
}

void gate_and_up(lk_decoder &decoder, lk_cpu &cpu, const lk_weight &weight, const Panel &panel, int64_t rows, float *out) {
    const int64_t inner = weight.out_features / 2, least = panel.in_squares() ? 128 : 48;
    float *scratch = decoder.scratch.at_least(2 * ROW_BLOCK * least * cpu.pool->threads());
    share_product(cpu, rows, inner, unit_of(panel, 12), [&](int64_t row, int64_t count, int64_t first, int64_t features, int thread) {
        float *gate = scratch + thread * 2 * ROW_BLOCK * least, *up = gate + ROW_BLOCK * least;
        const int64_t part = least * (ROW_BLOCK / count); // as many as there is room for
        for (int64_t n = first; n < first + features; n += part) {
            const int64_t some = first + features - n < part ? first + features - n : part;
            cpu.isa->products(weight, panel, row, count, n, some, gate, part, false);
            cpu.isa->products(weight, panel, row, count, inner + n, some, up, part, false);
            for (int64_t m = 0; m < count; m++)
                cpu.isa->swiglu(some, gate + m * part, up + m * part, out + (row + m) * inner + n);
        }
    });
}

lk_status check_layer(lk_handle *handle, const lk_decoder_args &args, const lk_layer &layer) {
    const int64_t width = args.width, heads = args.heads * args.head_dim;
    const struct {
        const char *name;
        const lk_weight &weight;
        int64_t out, in;
    } weights[] = {{"qkv", layer.qkv, heads + 2 * args.kv_heads * args.head_dim, width},
                   {"out", layer.out, width, heads},
                   {"gate_up", layer.gate_up, layer.gate_up.out_features, width},
                   {"down", layer.down, width, layer.gate_up.out_features / 2}};
    for (const auto &one : weights) {
        if (lk_status status = check_weight(handle, one.name, one.weight)) return status;
        if (one.weight.out_features != one.out || one.weight.in_features != one.in || layer.gate_up.out_features % 2)
            return lk_fail(handle, LK_INVALID_ARGUMENT, "%s is (%lld, %lld), not (%lld, %lld)", one.name,
                           (long long)one.weight.out_features, (long long)one.weight.in_features, (long long)one.out,
                           (long long)one.in);
    }
    CHECK_POINTERS(handle, {"attention_norm", layer.attention_norm}, {"mlp_norm", layer.mlp_norm},
                   {"k_cache", layer.k_cache}, {"v_cache", layer.v_cache});
    return LK_OK;
}

lk_status check_decoder(lk_handle *handle, const lk_decoder_args *args) {
    if (lk_status status = lk_check_call(handle, args, args ? args->dtype : LK_FLOAT32)) return status;
    if (!handle->cpu) return lk_fail(handle, LK_UNSUPPORTED, "only a handle of LK_CPU has decoders");
    if (lk_status status = check_dtype(handle, "a decoder", args->dtype)) return status;
    if (lk_status status = check_dtype(handle, "a decoder's cache", args->cache_dtype)) return status;
    CHECK_SIZES(handle, {"layers", args->layers, 0}, {"width", args->width, 1}, {"heads", args->heads, 1},
                {"kv_heads", args->kv_heads, 1}, {"head_dim", args->head_dim, 2}, {"positions", args->positions, 1},
                {"blocks", args->blocks, 1}, {"block_size", args->block_size, 1});
    if (args->head_dim % 2 || args->head_dim > MAX_HEAD_DIM || args->heads % args->kv_heads ||
        args->heads / args->kv_heads > MAX_QUERIES)
        return lk_fail(handle, LK_UNSUPPORTED, "%lld heads of %lld on %lld of keys: head_dim must be even and at most 256, "
                       "heads a multiple, at most 32 times, of kv_heads", (long long)args->heads,
                       (long long)args->head_dim, (long long)args->kv_heads);
    if (lk_status status = check_activation_bits(handle, args->activation_bits)) return status;
    CHECK_POINTERS(handle, {"norm", args->norm}, {"cos", args->cos}, {"sin", args->sin}, {"layer", args->layer});
    if (lk_status status = check_weight(handle, "head", args->head)) return status;
    if (args->head.in_features != args->width)
        return lk_fail(handle, LK_INVALID_ARGUMENT, "head has %lld input features, not %lld",
                       (long long)args->head.in_features, (long long)args->width);
    if (args->screen.data) {
        if (lk_status status = check_weight(handle, "screen", args->screen)) return status;
        if (args->screen.format != LK_WEIGHT_INT8 || args->screen.in_features != args->width ||
            args->screen.out_features != args->head.out_features)
            return lk_fail(handle, LK_INVALID_ARGUMENT, "screen is not of 8 bits and of the head's shape");
        CHECK_POINTERS(handle, {"screen_error", args->screen_error});
    }
    for (int64_t i = 0; i < args->layers; i++)
        if (lk_status status = check_layer(handle, *args, args->layer[i])) return status;
    return LK_OK;
}

int64_t bytes_of(const lk_weight &weight) {
    const int64_t row = weight.row_stride ? weight.row_stride : weight.in_features;
    if (weight.format <= LK_WEIGHT_BFLOAT16) return weight.out_features * row * (weight.format == LK_WEIGHT_FLOAT32 ? 4 : 2);
    return weight.out_features * weight.in_features / (weight.format == LK_WEIGHT_INT8 ? 1 : 2);
}

lk_status check_tokens(lk_decoder *decoder, const lk_step_args *args) {
    const lk_decoder_args &shape = decoder->args;
    lk_handle *handle = decoder->handle;
    const int64_t slots = shape.blocks * shape.block_size;
    for (int64_t t = 0; t < args->tokens; t++) {
        if (args->positions[t] < 0 || args->positions[t] >= shape.positions)
            return lk_fail(handle, LK_INVALID_ARGUMENT, "positions[%lld] is %d, not below %lld", (long long)t,
                           args->positions[t], (long long)shape.positions);
        if (args->slots[t] < -1 || args->slots[t] >= slots)
            return lk_fail(handle, LK_INVALID_ARGUMENT, "slots[%lld] is %lld, not below %lld", (long long)t,
                           (long long)args->slots[t], (long long)slots);
    }
    for (int64_t i = 0; args->rows && i < args->outputs; i++)
        if (args->rows[i] < (i ? args->rows[i - 1] + 1 : 0) || args->rows[i] >= args->tokens)
            return lk_fail(handle, LK_INVALID_ARGUMENT, "rows[%lld] is %lld: rows must ascend, below %lld", (long long)i,
                           (long long)args->rows[i], (long long)args->tokens);
    return LK_OK;
}

// Moves the rows that are wanted to the front.
void keep_rows(const lk_step_args &step, int64_t width, float *x) {
    for (int64_t i = 0; i < step.outputs; i++) std::memmove(x + i * width, x + step.rows[i] * width, width * sizeof(float));
}

void run_layers(lk_decoder *decoder, lk_cpu &cpu, const lk_step_args &step, const PagedStep &paged) {
    const lk_decoder_args &args = decoder->args;
    const int64_t width = args.width, attended_width = args.heads * args.head_dim;
    const bool half = args.dtype == LK_BFLOAT16, coarse = args.activation_bits == 8;
    int64_t tokens = step.tokens;
    float *x = step.rows ? decoder->stream.at_least(tokens * width) : step.hidden;
    cpu.isa->to_float(step.dtype, step.x, x, tokens * width);
    float *q = decoder->qkv.at_least(tokens * attended_width), *attended = decoder->attended.at_least(tokens * attended_width);
    for (int64_t i = 0; i < args.layers; i++) {
        const lk_layer &layer = decoder->layers[i];
        const int64_t inner = layer.down.in_features;
        const Source first{LK_FLOAT32, x, width, decoder->norm(2 * i), nullptr, args.eps, half, false, coarse};
        project_heads(*decoder, cpu, layer, prepare(cpu, decoder->panel, layer.qkv, first, tokens), step, q);
        attend(cpu, paged, layer.k_cache, layer.v_cache, q, attended_width, attended);
        if (step.rows && i == args.layers - 1) { // no other token is looked at any more
            keep_rows(step, width, x), keep_rows(step, attended_width, attended);
            tokens = step.outputs;
            if (!tokens) return;
        }
        const Source heads{LK_FLOAT32, attended, attended_width, nullptr, nullptr, 0, half, false, coarse};
        add_product(cpu, layer.out, prepare(cpu, decoder->panel, layer.out, heads, tokens), tokens, x);
        const Source second{LK_FLOAT32, x, width, decoder->norm(2 * i + 1), nullptr, args.eps, half, false, coarse};
        float *gated = decoder->gated.at_least(tokens * inner);
        gate_and_up(*decoder, cpu, layer.gate_up, prepare(cpu, decoder->panel, layer.gate_up, second, tokens), tokens, gated);
        const Source middle{LK_FLOAT32, gated, inner, nullptr, nullptr, 0, half, false, coarse};
        add_product(cpu, layer.down, prepare(cpu, decoder->inner, layer.down, middle, tokens), tokens, x);
    }
    if (step.rows && !args.layers) keep_rows(step, width, x);
    if (step.rows) std::memcpy(step.hidden, x, step.outputs * width * sizeof(float));
}

// A product with the screen leaves few candidates, of which alone the head's rows are read.
constexpr int64_t SCREENED_ROWS = 4, CANDIDATES = 256;

Source head_source(const lk_decoder &decoder, const float *hidden, int64_t rows) {
    const lk_decoder_args &args = decoder.args;
    const bool screened = args.screen.data && rows <= SCREENED_ROWS; // the screen is about logits of 16 bits
    return {LK_FLOAT32, hidden, args.width, decoder.norm(2 * args.layers), nullptr, args.eps,
            args.dtype == LK_BFLOAT16, false, args.activation_bits == 8 && !screened};
}

void head_product(lk_decoder &decoder, lk_cpu &cpu, int64_t rows, const float *hidden, float *logits) {
    const lk_weight &head = decoder.args.head;
    const Panel &panel = prepare(cpu, decoder.panel, head, head_source(decoder, hidden, rows), rows);
    share_product(cpu, rows, head.out_features, unit_of(panel, 12),
                  [&](int64_t row, int64_t count, int64_t first, int64_t features, int) {
        cpu.isa->products(head, panel, row, count, first, features, logits + row * head.out_features + first,
                          head.out_features, false);
    });
}

using Best = lk_decoder::Best;

// The larger one, of equals the first; a NaN is the largest, as in numpy.
const Best &better(const Best &a, const Best &b) {
    const bool lost = a.value != a.value;
    if (lost != (b.value != b.value)) return lost ? a : b;
    if (!lost && a.value != b.value) return a.value > b.value ? a : b;
    return a.at < b.at ? a : b;
}

// The likeliest token of every row, without memory for all logits.
void likeliest_tokens(lk_decoder &decoder, lk_cpu &cpu, int64_t rows, const float *hidden, int64_t *tokens) {
    constexpr int64_t PART = 256; // features at least, whose logits stay near
    const lk_weight &head = decoder.args.head;
    const int64_t threads = cpu.pool->threads();
    const Panel &panel = prepare(cpu, decoder.panel, head, head_source(decoder, hidden, rows), rows);
    float *scratch = decoder.scratch.at_least(ROW_BLOCK * PART * threads);
    Best *bests = decoder.bests.at_least(rows * threads);
    std::fill_n(bests, rows * threads, Best{-INFINITY, INT64_MAX});
    share_product(cpu, rows, head.out_features, unit_of(panel, 12),
                  [&](int64_t row, int64_t count, int64_t first, int64_t features, int thread) {
        float *logits = scratch + thread * ROW_BLOCK * PART;
        const int64_t part = PART * (ROW_BLOCK / count); // as many as there is room for
        for (int64_t n = first; n < first + features; n += part) {
            const int64_t some = std::min(part, first + features - n);
            cpu.isa->products(head, panel, row, count, n, some, logits, part, false);
            for (int64_t m = 0; m < count; m++) {
                Best &best = bests[thread * rows + row + m];
                const int64_t at = cpu.isa->likeliest(some, logits + m * part);
                best = better(best, {logits[m * part + at], n + at});
            }
        }
    });
    for (int64_t r = 0; r < rows; r++) {
        Best best = bests[r];
        for (int64_t t = 1; t < threads; t++) best = better(best, bests[t * rows + r]);
        tokens[r] = best.at;
    }
}

// The likeliest of one of the panel's rows, or -1 where too many could be it. norm: of that row; floor: what a candidate
// reaches.
int64_t best_candidate(const lk_decoder &decoder, const lk_cpu &cpu, const Panel &panel, int64_t row, const float *rough,
                       float norm, float floor) {
    const lk_weight &head = decoder.args.head;
    const float *error = decoder.args.screen_error;
    int64_t candidates[CANDIDATES], count = 0;
    for (int64_t n = 0; n < head.out_features; n++) {
        if (!(rough[n] + error[n] * norm >= floor)) continue;
        if (count == CANDIDATES) return -1;
        candidates[count++] = n;
    }
    int64_t best = -1;
    float most = 0;
    for (int64_t i = 0; i < count; i++) {
        float logits[SCREENED_ROWS]; // a panel in tiles has no rows of its own
        cpu.isa->products(head, panel, 0, panel.rows, candidates[i], 1, logits, 1, false);
        if (best < 0 || logits[row] > most) best = candidates[i], most = logits[row];
    }
    return best;
}

// Whether all tokens were found.
bool screen_tokens(lk_decoder &decoder, lk_cpu &cpu, int64_t rows, const float *hidden, int64_t *tokens) {
    const lk_weight &screen = decoder.args.screen;
    const int64_t vocabulary = screen.out_features, threads = cpu.pool->threads();
    const Source source = head_source(decoder, hidden, rows);
    Source seen = source; // what the head's product sees, whose logits these are about
    seen.rounded = cpu.isa->rounds(source.half) && decoder.args.head.format == LK_WEIGHT_BFLOAT16;
    const Panel &panel = prepare(cpu, decoder.rough, screen, seen, rows);
    float norms[SCREENED_ROWS], *floors = decoder.floors.at_least(threads * SCREENED_ROWS);
    float *rough = decoder.logits.at_least(rows * vocabulary);
    for (int64_t r = 0; r < rows; r++) {
        double squares = 0;
        const float *x = panel.values + r * panel.stride;
        for (int64_t i = 0; i < panel.stride; i++) squares += (double)x[i] * x[i];
        norms[r] = (float)(std::sqrt(squares) * 1.000001);
    }
    std::fill_n(floors, threads * SCREENED_ROWS, -INFINITY);
    share_product(cpu, rows, vocabulary, 12, [&](int64_t, int64_t, int64_t first, int64_t features, int thread) {
        cpu.isa->products(screen, panel, 0, rows, first, features, rough + first, vocabulary, false);
        for (int64_t r = 0; r < rows; r++) { // the largest is at least as large as every lower bound
            float &floor = floors[thread * SCREENED_ROWS + r];
            for (int64_t n = first; n < first + features; n++)
                floor = std::max(floor, rough[r * vocabulary + n] - decoder.args.screen_error[n] * norms[r]);
        }
    });
    const Panel &exact = prepare(cpu, decoder.panel, decoder.args.head, source, rows);
    for (int64_t r = 0; r < rows; r++) {
        float floor = floors[r];
        for (int64_t t = 1; t < threads; t++) floor = std::max(floor, floors[t * SCREENED_ROWS + r]);
        tokens[r] = best_candidate(decoder, cpu, exact, r, rough + r * vocabulary, norms[r], floor);
        if (tokens[r] < 0) return false;
    }
    return true;
}

void find_likeliest(lk_decoder &decoder, lk_cpu &cpu, int64_t rows, const float *hidden, int64_t *tokens) {
    if (decoder.args.screen.data && rows <= SCREENED_ROWS && screen_tokens(decoder, cpu, rows, hidden, tokens)) return;
    likeliest_tokens(decoder, cpu, rows, hidden, tokens);
}

lk_status check_next(lk_decoder *decoder, const lk_next_args *args) {
    lk_handle *handle = decoder->handle;
    if (lk_status status = lk_check_call(handle, args, args ? args->dtype : LK_FLOAT32)) return status;
    if (lk_status status = check_dtype(handle, "an embedding", args->dtype)) return status;
    CHECK_SIZES(handle, {"sequences", args->sequences, 0}, {"vocabulary", args->vocabulary, 1},
                {"table_rows", args->table_rows, 0}, {"table_stride", args->table_stride, 1});
    if (args->sequences == 0) return LK_OK;
    CHECK_POINTERS(handle, {"embedding", args->embedding}, {"rows", args->rows}, {"computed", args->computed},
                   {"last", args->last}, {"block_table", args->block_table},
                   {"tokens", args->logits ? static_cast<const void *>(args->logits) : args->tokens});
    const int64_t slots = args->table_stride * decoder->args.block_size;
    for (int64_t s = 0; s < args->sequences; s++) {
        const int64_t row = args->rows[s], computed = args->computed[s];
        if (row < 0 || row >= args->table_rows)
            return lk_fail(handle, LK_INVALID_ARGUMENT, "rows[%lld] is %lld, not below %lld", (long long)s, (long long)row,
                           (long long)args->table_rows);
        if (args->last[row] < 0 || args->last[row] >= args->vocabulary)
            return lk_fail(handle, LK_INVALID_ARGUMENT, "last[%lld] is %lld, not below %lld", (long long)row,
                           (long long)args->last[row], (long long)args->vocabulary);
        if (computed < 0 || computed >= std::min(slots, decoder->args.positions))
            return lk_fail(handle, LK_INVALID_ARGUMENT, "computed[%lld] is %lld, not below %lld", (long long)s,
                           (long long)computed, (long long)std::min(slots, decoder->args.positions));
    }
    return LK_OK;
}

// The step that computes the last tokens.
lk_step_args step_of(lk_decoder &decoder, const lk_next_args &args) {
    const int64_t count = args.sequences, size = decoder.args.block_size, bytes = decoder.args.width * size_of(args.dtype);
    int64_t held = 0; // blocks of the longest
    for (int64_t s = 0; s < count; s++) held = std::max(held, args.computed[s] / size + 1);
    auto &next = decoder.next;
    char *x = next.x.at_least(count * bytes);
    int32_t *positions = next.positions.at_least(count), *contexts = next.context_lens.at_least(count);
    int32_t *table = next.block_table.at_least(count * held), *start = next.query_start.at_least(count + 1);
    int64_t *slots = next.slots.at_least(count);
    for (int64_t s = 0; s < count; s++) {
        const int64_t row = args.rows[s], computed = args.computed[s];
        const int32_t *blocks = args.block_table + row * args.table_stride;
        std::memcpy(x + s * bytes, static_cast<const char *>(args.embedding) + args.last[row] * bytes, (size_t)bytes);
        std::copy_n(blocks, held, table + s * held);
        positions[s] = (int32_t)computed, contexts[s] = (int32_t)computed + 1, start[s] = (int32_t)s;
        slots[s] = blocks[computed / size] * size + computed % size;
    }
    start[count] = (int32_t)count;
    return {.dtype = args.dtype, .tokens = count, .sequences = count, .x = x, .positions = positions, .slots = slots,
            .block_table = table, .table_stride = held, .context_lens = contexts, .query_start = start,
            .hidden = next.hidden.at_least(count * decoder.args.width), .rows = nullptr, .outputs = 0};
}

} // namespace

extern "C" {

lk_status lk_decoder_create(lk_handle *handle, const lk_decoder_args *args, lk_decoder **decoder) {
    if (decoder) *decoder = nullptr;
    if (lk_status status = check_decoder(handle, args)) return status;
    if (!decoder) return lk_fail(handle, LK_INVALID_ARGUMENT, "decoder is NULL");
    return guarded(handle, [&] {
        auto made = std::make_unique<lk_decoder>();
        made->handle = handle, made->args = *args;
        made->layers.assign(args->layer, args->layer + args->layers);
        lk_decoder_args &own = made->args;
        own.layer = made->layers.data();
        own.cache_head_stride = lk_or(args->cache_head_stride, args->head_dim);
        own.cache_token_stride = lk_or(args->cache_token_stride, args->kv_heads * own.cache_head_stride);
        own.cache_block_stride = lk_or(args->cache_block_stride, args->block_size * own.cache_token_stride);
        made->norms.resize((size_t)((2 * args->layers + 1) * args->width));
        for (int64_t i = 0; i <= 2 * args->layers; i++) {
            const void *norm = i == 2 * args->layers ? args->norm
                               : i % 2               ? made->layers[i / 2].mlp_norm
                                                     : made->layers[i / 2].attention_norm;
            handle->cpu->isa->to_float(args->dtype, norm, made->norms.data() + i * args->width, args->width);
        }
        use_large_pages(own.head.data, bytes_of(own.head));
        if (own.screen.data) use_large_pages(own.screen.data, bytes_of(own.screen));
        for (const lk_layer &layer : made->layers)
            for (const lk_weight *weight : {&layer.qkv, &layer.out, &layer.gate_up, &layer.down})
                use_large_pages(weight->data, bytes_of(*weight));
        *decoder = made.release();
        return LK_OK;
    });
}

void lk_decoder_destroy(lk_decoder *decoder) { delete decoder; }

lk_status lk_decoder_step(lk_decoder *decoder, const lk_step_args *args) {
    if (!decoder) return LK_INVALID_ARGUMENT;
    lk_handle *handle = decoder->handle;
    if (lk_status status = lk_check_call(handle, args, args ? args->dtype : LK_FLOAT32)) return status;
    if (lk_status status = check_dtype(handle, "a step", args->dtype)) return status;
    CHECK_SIZES(handle, {"tokens", args->tokens, 0}, {"sequences", args->sequences, 0}, {"outputs", args->outputs, 0});
    if (args->tokens == 0) return LK_OK;
    CHECK_POINTERS(handle, {"x", args->x}, {"positions", args->positions}, {"slots", args->slots},
                   {"block_table", args->block_table}, {"context_lens", args->context_lens},
                   {"query_start", args->query_start}, {"hidden", args->hidden});
    if (lk_status status = check_tokens(decoder, args)) return status;
    const lk_decoder_args &shape = decoder->args;
    const PagedStep paged{args->sequences, shape.heads, shape.kv_heads, shape.head_dim, shape.block_size,
                          shape.cache_dtype, shape.cache_block_stride, shape.cache_token_stride, shape.cache_head_stride,
                          args->block_table, args->context_lens, args->query_start, args->table_stride};
    if (lk_status status = check_step(handle, paged, args->tokens, shape.blocks)) return status;
    return guarded(handle, [&] {
        run_layers(decoder, *handle->cpu, *args, paged);
        return LK_OK;
    });
}

lk_status lk_decoder_head(lk_decoder *decoder, int64_t rows, const float *hidden, float *logits) {
    if (!decoder) return LK_INVALID_ARGUMENT;
    lk_handle *handle = decoder->handle;
    CHECK_SIZES(handle, {"rows", rows, 0});
    if (rows == 0) return LK_OK;
    CHECK_POINTERS(handle, {"hidden", hidden}, {"logits", logits});
    return guarded(handle, [&] {
        head_product(*decoder, *handle->cpu, rows, hidden, logits);
        return LK_OK;
    });
}

lk_status lk_decoder_likeliest(lk_decoder *decoder, int64_t rows, const float *hidden, int64_t *tokens) {
    if (!decoder) return LK_INVALID_ARGUMENT;
    lk_handle *handle = decoder->handle;
    CHECK_SIZES(handle, {"rows", rows, 0});
    if (rows == 0) return LK_OK;
    CHECK_POINTERS(handle, {"hidden", hidden}, {"tokens", tokens});
    return guarded(handle, [&] {
        find_likeliest(*decoder, *handle->cpu, rows, hidden, tokens);
        return LK_OK;
    });
}

lk_status lk_decoder_next(lk_decoder *decoder, const lk_next_args *args) {
    if (!decoder) return LK_INVALID_ARGUMENT;
    lk_handle *handle = decoder->handle;
    if (lk_status status = check_next(decoder, args)) return status;
    const int64_t count = args->sequences;
    if (count == 0) return LK_OK;
    return guarded(handle, [&] {
        const lk_step_args step = step_of(*decoder, *args);
        if (lk_status status = lk_decoder_step(decoder, &step)) return status;
        if (args->logits) return lk_decoder_head(decoder, count, step.hidden, args->logits);
        find_likeliest(*decoder, *handle->cpu, count, step.hidden, args->tokens);
        return LK_OK;
    });
}

} // extern "C"
