#include <stdlib.h>

#include "cpu/cpu.h"
#include "ops.h"

/* The first row that is named twice, -1 where none is. All rows lie below patches + texts. */
static int64_t repeated_row(const lk_project_splice_args *args, int64_t patches, unsigned char *seen) {
    for (int64_t i = 0; i < patches + args->texts; i++) {
        int32_t row = i < patches ? args->image_rows[i] : args->text_rows[i - patches];
        if (seen[row]++) return row;
    }
    return -1;
}

/* On the CPU wrong places would be written to, so they are looked at first; on a GPU that would cost a pass. */
static lk_status check_places(lk_handle *handle, const lk_project_splice_args *args, int64_t patches) {
    int64_t tokens = patches + args->texts;
    for (int64_t p = 0; p < patches; p++)
        if (args->image_rows[p] < 0 || args->image_rows[p] >= tokens)
            return lk_fail(handle, LK_INVALID_ARGUMENT, "image_rows[%lld] is %d, which is none of the %lld rows",
                           (long long)p, args->image_rows[p], (long long)tokens);
    for (int64_t i = 0; i < args->texts; i++) {
        int32_t row = args->text_rows[i];
        if (row < 0 || row >= tokens)
            return lk_fail(handle, LK_INVALID_ARGUMENT, "text_rows[%lld] is %d, which is none of the %lld rows",
                           (long long)i, row, (long long)tokens);
        if (args->input_ids[row] < 0 || args->input_ids[row] >= args->vocabulary)
            return lk_fail(handle, LK_INVALID_ARGUMENT, "input_ids[%d] is %lld, outside the vocabulary of %lld", row,
                           (long long)args->input_ids[row], (long long)args->vocabulary);
    }
    unsigned char *seen = calloc((size_t)tokens, 1);
    if (!seen) return lk_fail(handle, LK_OUT_OF_MEMORY, "out of host memory");
    int64_t twice = repeated_row(args, patches, seen);
    free(seen);
    if (twice >= 0)
        return lk_fail(handle, LK_INVALID_ARGUMENT, "row %lld stands twice in image_rows and text_rows", (long long)twice);
    return LK_OK;
}

static lk_status on_cpu(lk_handle *handle, const lk_project_splice_args *args, int64_t patches, int64_t image_stride,
                        int64_t patch_stride) {
    lk_status status = check_places(handle, args, patches);
    return status ? status : lk_cpu_project_splice(handle, args, patches, image_stride, patch_stride);
}

static lk_status on_gpu(lk_handle *handle, const lk_project_splice_args *args, int64_t patches, int64_t image_stride,
                        int64_t patch_stride, lk_stream stream) {
    const char *type = lk_pointer_type(args->dtype);
    /* What no image or no text leaves unread may be NULL; the kernel gets `out` in its stead. */
    const void *unread = args->out;
    struct lk_values values = VALUES(
        POINTER("features_ptr", type, patches ? args->features : unread),
        POINTER("weight_ptr", type, patches ? args->weight : unread),
        POINTER("bias_ptr", type, args->bias),
        POINTER("embedding_ptr", type, args->texts ? args->embedding : unread),
        POINTER("input_ids_ptr", "*i64", args->texts ? (const void *)args->input_ids : unread),
        POINTER("image_rows_ptr", "*i32", patches ? (const void *)args->image_rows : unread),
        POINTER("text_rows_ptr", "*i32", args->texts ? (const void *)args->text_rows : unread),
        POINTER("out_ptr", type, args->out),
        INTEGER("image_count", patches),
        INTEGER("text_count", args->texts),
        INTEGER("patches", patches ? args->image_patches : 1),
        INTEGER("image_stride", patches ? image_stride : 0),
        INTEGER("patch_stride", patches ? patch_stride : 0),
        INTEGER("C", patches ? args->channels : 0),
        INTEGER("D", args->width));
    lk_add_blocks(handle, "project_splice", patches, &values);
    int64_t block_k = lk_integer(&values, "BLOCK_K");
    if (patches && args->channels % block_k)
        return lk_fail(handle, LK_UNSUPPORTED, "channels is %lld; the kernels take multiples of %lld",
                       (long long)args->channels, (long long)block_k);
    const struct lk_kernel *kernel;
    lk_status status = lk_find(handle, "_project_splice_forward_kernel", &values, &kernel);
    if (status) return status;
    int64_t tiles = lk_cdiv(patches, lk_integer(&values, "BLOCK_M")) * lk_cdiv(args->width, lk_integer(&values, "BLOCK_N"));
    int64_t copies =
        lk_cdiv(args->texts, lk_integer(&values, "COPY_ROWS")) * lk_cdiv(args->width, lk_integer(&values, "COPY_COLUMNS"));
    return lk_launch(handle, kernel, &values, tiles + copies, 1, 1, stream);
}

lk_status lk_project_splice(lk_handle *handle, const lk_project_splice_args *args, lk_stream stream) {
    lk_status status = lk_check_call(handle, args, args ? args->dtype : LK_FLOAT32);
    if (status) return status;
    CHECK_SIZES(handle, {"images", args->images, 0}, {"image_patches", args->image_patches, 0},
                {"texts", args->texts, 0});
    int64_t patches = args->images * args->image_patches;
    CHECK_SIZES(handle, {"images * image_patches + texts", patches + args->texts, 0});
    if (patches + args->texts == 0) return LK_OK;
    CHECK_SIZES(handle, {"width", args->width, 1});
    CHECK_POINTERS(handle, {"out", args->out});
    if (patches) {
        CHECK_SIZES(handle, {"channels", args->channels, 1});
        CHECK_POINTERS(handle, {"features", args->features}, {"weight", args->weight},
                       {"image_rows", args->image_rows});
    }
    if (args->texts) {
        CHECK_SIZES(handle, {"vocabulary", args->vocabulary, 1});
        CHECK_POINTERS(handle, {"embedding", args->embedding}, {"input_ids", args->input_ids},
                       {"text_rows", args->text_rows});
    }
    int64_t patch_stride = lk_or(args->patch_stride, args->channels);
    int64_t image_stride = lk_or(args->image_stride, args->image_patches * patch_stride);
    if (handle->device == LK_CPU) return on_cpu(handle, args, patches, image_stride, patch_stride);
    return on_gpu(handle, args, patches, image_stride, patch_stride, stream);
}
