/* rms_norm, rope, swiglu. */
#include "cpu/cpu.h"
#include "ops.h"

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

lk_status lk_rms_norm(lk_handle *handle, const lk_rms_norm_args *args, lk_stream stream) {
    lk_status status = lk_check_call(handle, args, args ? args->dtype : LK_FLOAT32);
    if (status) return status;
    CHECK_SIZES(handle, {"rows", args->rows, 0}, {"width", args->width, 1});
    if (args->rows == 0) return LK_OK;
    CHECK_POINTERS(handle, {"x", args->x}, {"weight", args->weight}, {"out", args->out});
    if (!args->residual != !args->sum)
        return lk_fail(handle, LK_INVALID_ARGUMENT, "residual and sum go together: one of them is NULL");
    if (handle->device == LK_CPU) return lk_cpu_rms_norm(handle, args);
    if (args->rstd) return lk_fail(handle, LK_UNSUPPORTED, "rms_norm keeps rstd on the CPU only");

    const char *type = lk_pointer_type(args->dtype);
    struct lk_values values = VALUES(
        POINTER("x_ptr", type, args->x),
        POINTER("residual_ptr", type, args->residual),
        POINTER("weight_ptr", type, args->weight),
        POINTER("out_ptr", type, args->out),
        POINTER("sum_ptr", type, args->sum),
        POINTER("rstd_ptr", "*fp32", NULL), /* kept for a backward pass only */
        INTEGER("x_stride", lk_or(args->x_stride, args->width)),
        INTEGER("residual_stride", args->residual ? lk_or(args->residual_stride, args->width) : 0),
        INTEGER("tokens", args->rows),
        INTEGER("dim", args->width),
        FLOAT("eps", args->eps),
        INTEGER("BLOCK", lk_next_power_of_2(args->width)));
    lk_add_blocks(handle, "rms_norm", args->width, &values);
    const struct lk_kernel *kernel;
    status = lk_find(handle, "_rms_norm_forward_kernel", &values, &kernel);
    if (status) return status;
    return lk_launch(handle, kernel, &values, lk_cdiv(args->rows, lk_integer(&values, "ROWS")), 1, 1, stream);
}

lk_status lk_rope(lk_handle *handle, const lk_rope_args *args, lk_stream stream) {
    lk_status status = lk_check_call(handle, args, args ? args->dtype : LK_FLOAT32);
    if (status) return status;
    CHECK_SIZES(handle, {"tokens", args->tokens, 0}, {"heads", args->heads, 0}, {"head_dim", args->head_dim, 2});
    if (args->head_dim % 2)
        return lk_fail(handle, LK_INVALID_ARGUMENT, "head_dim is %lld, which is odd", (long long)args->head_dim);
    if (args->tokens * args->heads == 0) return LK_OK;
    CHECK_POINTERS(handle, {"x", args->x}, {"cos", args->cos}, {"sin", args->sin}, {"out", args->out});
    if (handle->device == LK_CPU) return lk_cpu_rope(handle, args);

    const char *type = lk_pointer_type(args->dtype);
    int64_t x_head = lk_or(args->x_head_stride, args->head_dim), out_head = lk_or(args->out_head_stride, args->head_dim);
    struct lk_values values = VALUES(
        POINTER("x_ptr", type, args->x),
        POINTER("cos_ptr", "*fp32", args->cos),
        POINTER("sin_ptr", "*fp32", args->sin),
        POINTER("out_ptr", type, args->out),
        INTEGER("x_token_stride", lk_or(args->x_token_stride, args->heads * x_head)),
        INTEGER("x_head_stride", x_head),
        INTEGER("out_token_stride", lk_or(args->out_token_stride, args->heads * out_head)),
        INTEGER("out_head_stride", out_head),
        INTEGER("tokens", args->tokens),
        INTEGER("heads", args->heads),
        INTEGER("HALF", args->head_dim / 2),
        INTEGER("BLOCK", lk_next_power_of_2(args->head_dim / 2)),
        INTEGER("INVERSE", args->inverse != 0));
    lk_add_blocks(handle, "rope", args->tokens, &values);
    const struct lk_kernel *kernel;
    status = lk_find(handle, "_rope_kernel", &values, &kernel);
    if (status) return status;
    int64_t shares = least(lk_integer(&values, "shares"), lk_cdiv(args->heads, lk_integer(&values, "HEADS")));
    return lk_launch(handle, kernel, &values, lk_cdiv(args->tokens, lk_integer(&values, "TOKENS")), shares, 1, stream);
}

lk_status lk_swiglu(lk_handle *handle, const lk_swiglu_args *args, lk_stream stream) {
    lk_status status = lk_check_call(handle, args, args ? args->dtype : LK_FLOAT32);
    if (status) return status;
    CHECK_SIZES(handle, {"rows", args->rows, 0}, {"inner", args->inner, 1});
    if (args->rows == 0) return LK_OK;
    CHECK_POINTERS(handle, {"gate_up", args->gate_up}, {"out", args->out});
    if (handle->device == LK_CPU) return lk_cpu_swiglu(handle, args);

    const char *type = lk_pointer_type(args->dtype);
    struct lk_values values = VALUES(
        POINTER("gate_up_ptr", type, args->gate_up),
        POINTER("out_ptr", type, args->out),
        INTEGER("stride", lk_or(args->gate_up_stride, 2 * args->inner)),
        INTEGER("inner", args->inner));
    lk_add_blocks(handle, "swiglu", args->inner, &values);
    const struct lk_kernel *kernel;
    status = lk_find(handle, "_swiglu_forward_kernel", &values, &kernel);
    if (status) return status;
    return lk_launch(handle, kernel, &values, args->rows * lk_cdiv(args->inner, lk_integer(&values, "BLOCK")), 1, 1,
                     stream);
}
