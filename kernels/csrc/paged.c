/* store_kv and paged_attention: a key-value cache cut into blocks. */
#include <math.h>

#include "cpu/cpu.h"
#include "ops.h"

static lk_status check_cache(lk_handle *handle, lk_dtype dtype, lk_dtype cache_dtype, int64_t block_size) {
    if (cache_dtype != dtype && cache_dtype != LK_FLOAT8_E4M3)
        return lk_fail(handle, LK_INVALID_ARGUMENT, "cache_dtype is neither dtype nor LK_FLOAT8_E4M3");
    if (block_size != lk_next_power_of_2(block_size))
        return lk_fail(handle, LK_INVALID_ARGUMENT, "block_size is %lld, not a power of two", (long long)block_size);
    return LK_OK;
}

static float one_if_0(float scale) { return scale == 0 ? 1 : scale; }

lk_status lk_store_kv(lk_handle *handle, const lk_store_kv_args *args, lk_stream stream) {
    lk_status status = lk_check_call(handle, args, args ? args->dtype : LK_FLOAT32);
    if (status) return status;
    CHECK_SIZES(handle, {"tokens", args->tokens, 0}, {"kv_heads", args->kv_heads, 1}, {"head_dim", args->head_dim, 1},
                {"block_size", args->block_size, 1});
    if ((status = check_cache(handle, args->dtype, args->cache_dtype, args->block_size))) return status;
    if (args->tokens == 0) return LK_OK;
    CHECK_POINTERS(handle, {"k", args->k}, {"v", args->v}, {"k_cache", args->k_cache}, {"v_cache", args->v_cache},
                   {"slots", args->slots});
    if (handle->device == LK_CPU) return lk_cpu_store_kv(handle, args);

    const char *type = lk_pointer_type(args->dtype), *cache_type = lk_pointer_type(args->cache_dtype);
    int64_t head = lk_or(args->head_stride, args->head_dim), token = lk_or(args->token_stride, args->kv_heads * head);
    int64_t cache_head = lk_or(args->cache_head_stride, args->head_dim);
    int64_t cache_token = lk_or(args->cache_token_stride, args->kv_heads * cache_head);
    int64_t cache_block = lk_or(args->cache_block_stride, args->block_size * cache_token);
    struct lk_values values = VALUES(
        POINTER("K", type, args->k),
        POINTER("V", type, args->v),
        POINTER("K_CACHE", cache_type, args->k_cache),
        POINTER("V_CACHE", cache_type, args->v_cache),
        POINTER("SLOTS", "*i64", args->slots),
        INTEGER("stride_kt", token),
        INTEGER("stride_kh", head),
        INTEGER("stride_vt", token),
        INTEGER("stride_vh", head),
        INTEGER("stride_kcb", cache_block),
        INTEGER("stride_kct", cache_token),
        INTEGER("stride_kch", cache_head),
        INTEGER("stride_vcb", cache_block),
        INTEGER("stride_vct", cache_token),
        INTEGER("stride_vch", cache_head),
        FLOAT("k_factor", one_if_0(args->k_scale)),
        FLOAT("v_factor", one_if_0(args->v_scale)),
        INTEGER("kv_heads", args->kv_heads),
        INTEGER("PAGE", args->block_size),
        INTEGER("HEAD_DIM", args->head_dim),
        INTEGER("QUANTIZED", args->cache_dtype == LK_FLOAT8_E4M3));
    lk_add_blocks(handle, "store_kv", args->kv_heads * args->head_dim, &values);
    const struct lk_kernel *kernel;
    if ((status = lk_find(handle, "_store_kv_kernel", &values, &kernel))) return status;
    int64_t pieces = lk_cdiv(args->kv_heads * args->head_dim, lk_integer(&values, "BLOCK"));
    return lk_launch(handle, kernel, &values, args->tokens, pieces, 1, stream);
}

/* The parts of each row, weighted by their sums of exponentials. */
static lk_status combine(lk_handle *handle, const lk_paged_attention_args *args, const float *parts, const float *sums,
                         const struct lk_kernel **kernel, struct lk_values *values) {
    *values = (struct lk_values)VALUES(
        POINTER("PARTS", "*fp32", parts),
        POINTER("LSE", "*fp32", sums),
        POINTER("OUT", lk_pointer_type(args->dtype), args->out),
        INTEGER("SPLITS", args->splits),
        INTEGER("HEAD_DIM", args->head_dim));
    return lk_find(handle, "_paged_combine_kernel", values, kernel);
}

lk_status lk_paged_attention(lk_handle *handle, const lk_paged_attention_args *args, lk_stream stream) {
    lk_status status = lk_check_call(handle, args, args ? args->dtype : LK_FLOAT32);
    if (status) return status;
    CHECK_SIZES(handle, {"tokens", args->tokens, 0}, {"sequences", args->sequences, 0}, {"heads", args->heads, 1},
                {"kv_heads", args->kv_heads, 1}, {"head_dim", args->head_dim, 1}, {"block_size", args->block_size, 1},
                {"max_query", args->max_query, 0}, {"table_stride", args->table_stride, 0}, {"splits", args->splits, 0});
    if ((status = check_cache(handle, args->dtype, args->cache_dtype, args->block_size))) return status;
    if (args->heads % args->kv_heads)
        return lk_fail(handle, LK_INVALID_ARGUMENT, "heads is %lld, not a multiple of kv_heads, %lld",
                       (long long)args->heads, (long long)args->kv_heads);
    if (args->tokens == 0 || args->sequences == 0 || args->max_query == 0) return LK_OK;
    CHECK_POINTERS(handle, {"q", args->q}, {"k_cache", args->k_cache}, {"v_cache", args->v_cache},
                   {"block_table", args->block_table}, {"context_lens", args->context_lens},
                   {"query_start", args->query_start}, {"out", args->out});
    if (args->splits > 1) CHECK_POINTERS(handle, {"workspace", args->workspace});
    if (handle->device == LK_CPU) return lk_cpu_paged_attention(handle, args);

    const char *type = lk_pointer_type(args->dtype), *cache_type = lk_pointer_type(args->cache_dtype);
    int quantized = args->cache_dtype == LK_FLOAT8_E4M3, split = args->splits > 1;
    int64_t rows = args->tokens * args->heads, group = args->heads / args->kv_heads;
    float *parts = args->workspace, *sums = split ? parts + rows * args->splits * args->head_dim : NULL;
    int64_t q_head = lk_or(args->q_head_stride, args->head_dim);
    int64_t cache_head = lk_or(args->cache_head_stride, args->head_dim);
    int64_t cache_token = lk_or(args->cache_token_stride, args->kv_heads * cache_head);
    int64_t cache_block = lk_or(args->cache_block_stride, args->block_size * cache_token);
    /* Powers of 2 inside; 2^8 is what the kernel leaves out when it turns float8 into float16. */
    double unit = quantized ? 256 : 1, log2_e = 1.4426950408889634;
    double k_scale = quantized ? one_if_0(args->k_scale) * unit : 1, v_scale = quantized ? one_if_0(args->v_scale) * unit : 1;
    struct lk_values values = VALUES(
        POINTER("Q", type, args->q),
        POINTER("K", cache_type, args->k_cache),
        POINTER("V", cache_type, args->v_cache),
        POINTER("TABLE", "*i32", args->block_table),
        POINTER("CONTEXT", "*i32", args->context_lens),
        POINTER("STARTS", "*i32", args->query_start),
        POINTER("OUT", split ? "*fp32" : type, split ? (const void *)parts : args->out),
        POINTER("LSE", split ? "*fp32" : type, split ? (const void *)sums : args->out), /* not touched with one split */
        INTEGER("stride_qt", lk_or(args->q_token_stride, args->heads * q_head)),
        INTEGER("stride_qh", q_head),
        INTEGER("stride_kb", cache_block),
        INTEGER("stride_kt", cache_token),
        INTEGER("stride_kh", cache_head),
        INTEGER("stride_vb", cache_block),
        INTEGER("stride_vt", cache_token),
        INTEGER("stride_vh", cache_head),
        INTEGER("stride_table", args->table_stride),
        FLOAT("scale", log2_e / sqrt((double)args->head_dim) * k_scale),
        FLOAT("v_scale", v_scale),
        INTEGER("heads", args->heads),
        INTEGER("GROUP", group),
        INTEGER("HEAD_DIM", args->head_dim),
        INTEGER("PAGE", args->block_size),
        INTEGER("SPLITS", split ? args->splits : 1),
        INTEGER("QUANTIZED", quantized));
    lk_add_blocks(handle, "paged_attention", args->max_query * group, &values);
    const struct lk_kernel *kernel, *second = NULL;
    struct lk_values second_values;
    if ((status = lk_find(handle, "_paged_attention_kernel", &values, &kernel))) return status;
    if (split && (status = combine(handle, args, parts, sums, &second, &second_values))) return status;
    int64_t blocks = lk_cdiv(args->max_query * group, lk_integer(&values, "BLOCK_M"));
    int64_t grid_y = blocks * (split ? args->splits : 1);
    status = lk_launch(handle, kernel, &values, args->kv_heads, grid_y, args->sequences, stream);
    if (status || !split) return status;
    return lk_launch(handle, second, &second_values, rows, 1, 1, stream);
}
