// The operations one by one on the CPU.
#include <algorithm>
#include <cstring>

#if defined(LK_HAVE_X86)
#include <cpuid.h>
#endif
#if defined(LK_HAVE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "compact.h"
#include "handle.h"

namespace lk {

static const Isa *const built[] = {
#if defined(LK_HAVE_AVX512)
#if defined(LK_HAVE_AMX)
    &amx,
#endif
#if defined(LK_HAVE_AVX512BF16)
    &avx512bf16,
#endif
    &avx512vnni, &avx512,
#endif
#if defined(LK_HAVE_AVXVNNI)
    &avxvnni,
#endif
#if defined(LK_HAVE_X86)
    &avx2,
#elif defined(LK_HAVE_NEON)
    &neon,
#endif
    &portable, // runs everywhere
};

#if defined(LK_HAVE_AMX)
// Whether there are tiles of bfloat16, and the system lets this process have them: Linux wants to be asked.
static bool may_use_tiles() {
    static const bool may = [] {
        unsigned a, b, c, d;
        constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (BF16 | TILE)) != (BF16 | TILE)) return false;
        constexpr long REQUEST = 0x1023, TILE_DATA = 18; // ARCH_REQ_XCOMP_PERM of <asm/prctl.h>, and what is asked for
        return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    }();
    return may;
}
#endif

static bool runs(const Isa *isa) {
#if defined(LK_HAVE_X86)
    __builtin_cpu_init();
    const bool floor = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == &avx2) return floor;
#if defined(LK_HAVE_AVXVNNI)
    if (isa == &avxvnni) { // older compilers do not ask for it by name
        unsigned a, b, c, d;
        return floor && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
    }
#endif
#if defined(LK_HAVE_AVX512)
    const bool wide = floor && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (isa == &avx512) return wide;
    const bool vnni = wide && __builtin_cpu_supports("avx512vnni");
    if (isa == &avx512vnni) return vnni;
#if defined(LK_HAVE_AVX512BF16)
    const bool pairs = vnni && __builtin_cpu_supports("avx512bf16");
    if (isa == &avx512bf16) return pairs;
#if defined(LK_HAVE_AMX)
    if (isa == &amx) return pairs && may_use_tiles();
#endif
#endif
#endif
#endif
    (void)isa;
    return true;
}

const Isa *find_isa(const char *name) {
    for (const Isa *isa : built)
        if ((!name || !std::strcmp(name, isa->name)) && runs(isa)) return isa;
    return nullptr;
}

lk_status check_dtype(lk_handle *handle, const char *op, lk_dtype dtype) {
    if (dtype == LK_FLOAT32 || dtype == LK_BFLOAT16) return LK_OK;
    return lk_fail(handle, LK_UNSUPPORTED, "%s on the CPU takes float32 and bfloat16", op);
}

lk_status check_weight(lk_handle *handle, const char *name, const lk_weight &weight) {
    if (weight.format < LK_WEIGHT_FLOAT32 || weight.format > LK_WEIGHT_INT4)
        return lk_fail(handle, LK_INVALID_ARGUMENT, "%s: there is no weight format %d", name, (int)weight.format);
    CHECK_SIZES(handle, {"out_features", weight.out_features, 1}, {"in_features", weight.in_features, 1});
    if (!weight.data) return lk_fail(handle, LK_INVALID_ARGUMENT, "%s: data is NULL", name);
    if (weight.compact && (weight.format != LK_WEIGHT_BFLOAT16 || weight.compact->out_features != weight.out_features ||
                           weight.compact->in_features != weight.in_features))
        return lk_fail(handle, LK_INVALID_ARGUMENT, "%s: compact is (%lld, %lld) of bfloat16, the weight is not", name,
                       (long long)weight.compact->out_features, (long long)weight.compact->in_features);
    if (weight.format <= LK_WEIGHT_BFLOAT16) return LK_OK;
    if (!weight.scale) return lk_fail(handle, LK_INVALID_ARGUMENT, "%s: scale is NULL", name);
    if (weight.format == LK_WEIGHT_INT8) return LK_OK;
    if (!weight.group_pairs && (!weight.group_scale || !weight.group_offset))
        return lk_fail(handle, LK_INVALID_ARGUMENT, "%s: group_scale or group_offset is NULL, and group_pairs too", name);
    if (weight.group_size != 64 && weight.group_size != 128 && weight.group_size != 256)
        return lk_fail(handle, LK_INVALID_ARGUMENT, "%s: group_size is %lld, not 64, 128 or 256", name,
                       (long long)weight.group_size);
    if (!weight.group_pairs && weight.in_features > MAX_GROUPS * weight.group_size)
        return lk_fail(handle, LK_INVALID_ARGUMENT, "%s: more than %lld groups take group_pairs, which is NULL", name,
                       (long long)MAX_GROUPS);
    return LK_OK;
}

lk_status check_activation_bits(lk_handle *handle, int bits) {
    if (bits == 0 || bits == 8 || bits == 16) return LK_OK;
    return lk_fail(handle, LK_INVALID_ARGUMENT, "activation_bits is %d, not 0, 8 or 16", bits);
}

const Panel &prepare(lk_cpu &cpu, PanelBuffer &buffer, const lk_weight &weight, const Source &source, int64_t rows) {
    const Panel &panel = buffer.fit(*cpu.isa, weight, rows, source);
    if (rows <= FEW_ROWS) {
        cpu.isa->prepare(weight, source, 0, rows, panel);
        return panel;
    }
    const int64_t unit = panel.in_squares() || panel.layout == SIDE_BY_SIDE ? cpu.isa->lanes : 1;
    const int64_t part = cdiv(cdiv(rows, 4 * cpu.pool->threads()), unit) * unit;
    cpu.pool->each(cdiv(rows, part), [&](int64_t i, int) {
        cpu.isa->prepare(weight, source, i * part, (i + 1) * part < rows ? (i + 1) * part : rows, panel);
    });
    return panel;
}

lk_status check_step(lk_handle *handle, const PagedStep &step, int64_t tokens, int64_t blocks) {
    for (int64_t s = 0; s < step.sequences; s++) {
        const int64_t queries = step.query_start[s + 1] - step.query_start[s], context = step.context_lens[s];
        if (step.query_start[s] < 0 || queries < 0 || step.query_start[s + 1] > tokens || (queries && context < queries))
            return lk_fail(handle, LK_INVALID_ARGUMENT, "sequence %lld: %lld queries of %lld tokens cannot be",
                           (long long)s, (long long)queries, (long long)context);
        const int64_t held = queries ? cdiv(context, step.block_size) : 0;
        if (held > step.table_stride && step.sequences > 1)
            return lk_fail(handle, LK_INVALID_ARGUMENT, "sequence %lld: %lld blocks, but table_stride is %lld",
                           (long long)s, (long long)held, (long long)step.table_stride);
        for (int64_t b = 0; b < held; b++) {
            const int32_t block = step.block_table[s * step.table_stride + b];
            if (block < 0 || (blocks && block >= blocks))
                return lk_fail(handle, LK_INVALID_ARGUMENT, "sequence %lld: there is no block %d", (long long)s, block);
        }
    }
    return LK_OK;
}

} // namespace lk

const lk::Panel &PanelBuffer::fit(const lk::Isa &isa, const lk_weight &weight, int64_t rows, const lk::Source &source) {
    const bool coded = weight.format >= LK_WEIGHT_INT8;
    const int64_t group = weight.format == LK_WEIGHT_INT4 ? weight.group_size : lk::QUANTUM;
    panel.stride = lk::cdiv(weight.in_features, group) * group; // 128 is a multiple of what any vectors take
    panel.groups = panel.stride / group, panel.rows = rows;
    panel.totals = lk::cdiv(panel.groups, lk::PAIRS) * lk::PAIRS;
    const bool rounded = isa.rounds(source.half) && weight.format != LK_WEIGHT_FLOAT32;
    const int64_t quad_rows = weight.format == LK_WEIGHT_INT8 ? isa.quad_rows : isa.half_quad_rows;
    panel.layout = coded && source.coarse && rows >= quad_rows ? lk::IN_QUADS
                   : rounded && rows >= (coded ? isa.coded_tile_rows : isa.tile_rows) ? lk::IN_TILES
                   : rounded && !coded                                              ? lk::IN_PAIRS
                   : weight.format == LK_WEIGHT_INT4 && source.coarse && isa.takes_bytes ? lk::IN_BYTES
                   : weight.format == LK_WEIGHT_INT4 && rows == 1 && isa.takes_bytes   ? lk::IN_HALVES
                   : !coded && rows >= lk::MANY_ROWS && rows >= isa.lanes ? lk::SIDE_BY_SIDE
                                                                          : lk::BY_ROW;
    if (panel.layout == lk::IN_QUADS) panel.groups = panel.stride / lk::QUAD_BLOCK;
    // Rows that lie a multiple of 4 KiB apart would share, with those of the weight, a few places of the first cache.
    if (!coded && (panel.layout == lk::BY_ROW || panel.layout == lk::IN_PAIRS)) panel.stride += 32;
    const int64_t whole = lk::cdiv(rows, 16) * 16; // lanes are at most 16
    if (panel.layout != lk::IN_QUADS) panel.values = values.at_least(whole * panel.stride);
    if (coded) {
        panel.codes = codes.at_least(whole * panel.stride);
        panel.scale = scale.at_least(whole * std::max(panel.groups, panel.totals));
        panel.total = total.at_least(whole * std::max(panel.groups, panel.totals));
    }
    return panel;
}

using lk::cpu_only;
using lk::guarded;

extern "C" {

lk_status lk_cpu_open(lk_handle *handle) {
    return guarded(handle, [&] {
        auto cpu = std::make_unique<lk_cpu>();
        cpu->isa = lk::find_isa(nullptr);
        cpu->pool = std::make_unique<lk::Pool>(1);
        handle->cpu = cpu.release();
        return LK_OK;
    });
}

void lk_cpu_close(lk_cpu *cpu) { delete cpu; }

lk_status lk_set_threads(lk_handle *handle, int threads) {
    if (lk_status status = cpu_only(handle)) return status;
    if (threads < 1 || threads > 1024)
        return lk_fail(handle, LK_INVALID_ARGUMENT, "threads is %d, not between 1 and 1024", threads);
    return guarded(handle, [&] {
        if (threads != handle->cpu->pool->threads()) handle->cpu->pool = std::make_unique<lk::Pool>(threads);
        return LK_OK;
    });
}

lk_status lk_set_instructions(lk_handle *handle, const char *name) {
    if (lk_status status = cpu_only(handle)) return status;
    const lk::Isa *isa = lk::find_isa(name);
    if (!isa) return lk_fail(handle, LK_UNSUPPORTED, "the processor or the build has no instructions \"%s\"", name);
    handle->cpu->isa = isa;
    return LK_OK;
}

const char *lk_instructions(const lk_handle *handle) { return handle && handle->cpu ? handle->cpu->isa->name : ""; }

lk_status lk_linear(lk_handle *handle, const lk_linear_args *args, lk_stream) {
    if (lk_status status = cpu_only(handle)) return status;
    if (lk_status status = lk_check_call(handle, args, args ? args->dtype : LK_FLOAT32)) return status;
    if (lk_status status = lk::check_dtype(handle, "linear", args->dtype)) return status;
    CHECK_SIZES(handle, {"rows", args->rows, 0});
    if (lk_status status = lk::check_weight(handle, "weight", args->weight)) return status;
    if (lk_status status = lk::check_activation_bits(handle, args->activation_bits)) return status;
    if (args->rows == 0) return LK_OK;
    CHECK_POINTERS(handle, {"x", args->x}, {"out", args->out});
    return guarded(handle, [&] {
        lk_cpu &cpu = *handle->cpu;
        const lk_weight &weight = args->weight;
        const lk::Source source{args->dtype, args->x, lk_or(args->x_stride, weight.in_features), nullptr, nullptr, 0,
                                args->dtype == LK_BFLOAT16, false, args->activation_bits == 8};
        const lk::Panel &panel = lk::prepare(cpu, cpu.panel, weight, source, args->rows);
        const int64_t out_stride = lk_or(args->out_stride, weight.out_features), size = lk::size_of(args->dtype);
        constexpr int64_t UNIT = 48, ROOM = UNIT * lk::ROW_BLOCK;
        float *scratch = cpu.scratch.at_least(2 * ROOM * cpu.pool->threads());
        lk::share_product(cpu, args->rows, weight.out_features, UNIT,
                          [&](int64_t row, int64_t rows, int64_t first, int64_t count, int thread) {
            float *some = scratch + thread * 2 * ROOM, *bias = some + ROOM;
            const int64_t part = UNIT * (lk::ROW_BLOCK / rows); // as many as there is room for
            for (int64_t n = first; n < first + count; n += part) {
                const int64_t width = first + count - n < part ? first + count - n : part;
                if (args->bias) cpu.isa->to_float(args->dtype, static_cast<const char *>(args->bias) + n * size, bias, width);
                for (int64_t m = 0; args->bias && m < rows; m++) std::memcpy(some + m * part, bias, width * sizeof(float));
                cpu.isa->products(weight, panel, row, rows, n, width, some, part, args->bias != nullptr);
                for (int64_t m = 0; args->gelu && m < rows; m++) cpu.isa->gelu(width, some + m * part);
                for (int64_t m = 0; m < rows; m++)
                    cpu.isa->from_float(args->dtype, some + m * part,
                                        static_cast<char *>(args->out) + ((row + m) * out_stride + n) * size, width);
            }
        });
        return LK_OK;
    });
}

lk_status lk_cpu_rms_norm(lk_handle *handle, const lk_rms_norm_args *args) {
    if (lk_status status = lk::check_dtype(handle, "rms_norm", args->dtype)) return status;
    const lk::RmsNorm task{args->dtype, args->width, args->eps, args->x, args->residual, args->weight,
                           lk_or(args->x_stride, args->width), lk_or(args->residual_stride, args->width), args->out,
                           args->sum, args->rstd};
    lk::share_rows(*handle->cpu, args->rows, args->width,
                   [&](int64_t first, int64_t last, int64_t) { handle->cpu->isa->rms_norm(task, first, last); });
    return LK_OK;
}

lk_status lk_cpu_rope(lk_handle *handle, const lk_rope_args *args) {
    if (lk_status status = lk::check_dtype(handle, "rope", args->dtype)) return status;
    const int64_t dim = args->head_dim, x_head = lk_or(args->x_head_stride, dim), out_head = lk_or(args->out_head_stride, dim);
    const lk::Rope task{args->dtype, args->heads, dim, args->x, lk_or(args->x_token_stride, args->heads * x_head), x_head,
                        args->cos, args->sin, args->inverse != 0, args->out,
                        lk_or(args->out_token_stride, args->heads * out_head), out_head};
    lk::share_rows(*handle->cpu, args->tokens, args->heads * dim,
                   [&](int64_t first, int64_t last, int64_t) { handle->cpu->isa->rope(task, first, last); });
    return LK_OK;
}

lk_status lk_cpu_swiglu(lk_handle *handle, const lk_swiglu_args *args) {
    if (lk_status status = lk::check_dtype(handle, "swiglu", args->dtype)) return status;
    const lk::Swiglu task{args->dtype, args->inner, args->gate_up, nullptr, lk_or(args->gate_up_stride, 2 * args->inner), 0,
                          args->out};
    lk::share_rows(*handle->cpu, args->rows, 3 * args->inner,
                   [&](int64_t first, int64_t last, int64_t) { handle->cpu->isa->swiglu_rows(task, first, last); });
    return LK_OK;
}

lk_status lk_cpu_store_kv(lk_handle *handle, const lk_store_kv_args *args) {
    if (lk_status status = lk::check_dtype(handle, "store_kv", args->dtype)) return status;
    if (args->cache_dtype != args->dtype)
        return lk_fail(handle, LK_UNSUPPORTED, "store_kv on the CPU keeps the dtype of k and v");
    const int64_t size = lk::size_of(args->dtype), dim = args->head_dim, block = args->block_size;
    const int64_t head = lk_or(args->head_stride, dim), token = lk_or(args->token_stride, args->kv_heads * head);
    const int64_t cache_head = lk_or(args->cache_head_stride, dim);
    const int64_t cache_token = lk_or(args->cache_token_stride, args->kv_heads * cache_head);
    const int64_t cache_block = lk_or(args->cache_block_stride, block * cache_token);
    for (int64_t t = 0; t < args->tokens; t++) {
        const int64_t slot = args->slots[t];
        if (slot < 0) continue;
        for (int64_t h = 0; h < args->kv_heads; h++) {
            const int64_t from = (t * token + h * head) * size;
            const int64_t to = (slot / block * cache_block + slot % block * cache_token + h * cache_head) * size;
            std::memcpy(static_cast<char *>(args->k_cache) + to, static_cast<const char *>(args->k) + from, dim * size);
            std::memcpy(static_cast<char *>(args->v_cache) + to, static_cast<const char *>(args->v) + from, dim * size);
        }
    }
    return LK_OK;
}

lk_status lk_cpu_paged_attention(lk_handle *handle, const lk_paged_attention_args *args) {
    if (lk_status status = lk::check_dtype(handle, "paged_attention", args->dtype)) return status;
    if (args->cache_dtype != args->dtype)
        return lk_fail(handle, LK_UNSUPPORTED, "paged_attention on the CPU takes a cache of q's dtype");
    const int64_t dim = args->head_dim, size = lk::size_of(args->dtype), group = args->heads / args->kv_heads;
    if (dim > lk::MAX_HEAD_DIM || group > lk::MAX_QUERIES)
        return lk_fail(handle, LK_UNSUPPORTED, "paged_attention on the CPU takes a head_dim up to 256 and up to 32 heads "
                                               "on one of keys");
    return guarded(handle, [&] {
        lk_cpu &cpu = *handle->cpu;
        const int64_t head = lk_or(args->cache_head_stride, dim);
        const int64_t token = lk_or(args->cache_token_stride, args->kv_heads * head);
        const lk::PagedStep step{args->sequences, args->heads, args->kv_heads, dim, args->block_size, args->cache_dtype,
                                 lk_or(args->cache_block_stride, args->block_size * token), token, head,
                                 args->block_table, args->context_lens, args->query_start, args->table_stride};
        if (lk_status status = lk::check_step(handle, step, args->tokens, 0)) return status;
        const int64_t q_head = lk_or(args->q_head_stride, dim), q_token = lk_or(args->q_token_stride, args->heads * q_head);
        const int64_t width = args->heads * dim, count = args->tokens * width;
        Buffer<float> memory;
        float *q = memory.at_least(2 * count), *out = q + count;
        for (int64_t t = 0; t < args->tokens; t++)
            for (int64_t h = 0; h < args->heads; h++)
                cpu.isa->to_float(args->dtype, static_cast<const char *>(args->q) + (t * q_token + h * q_head) * size,
                                  q + t * width + h * dim, dim);
        lk::attend(cpu, step, args->k_cache, args->v_cache, q, width, out);
        cpu.isa->from_float(args->dtype, out, args->out, count);
        return LK_OK;
    });
}

} // extern "C"
