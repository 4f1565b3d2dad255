#include "ops.h"

lk_status lk_check_call(lk_handle *handle, const void *args, lk_dtype dtype) {
    if (!handle) return LK_INVALID_ARGUMENT;
    if (!args) return lk_fail(handle, LK_INVALID_ARGUMENT, "args is NULL");
    if (!lk_pointer_type(dtype)) return lk_fail(handle, LK_INVALID_ARGUMENT, "there is no dtype %d", (int)dtype);
    return LK_OK;
}

lk_status lk_check_sizes(lk_handle *handle, const struct lk_size *sizes, int count) {
    for (int i = 0; i < count; i++)
        if (sizes[i].value < sizes[i].least || sizes[i].value > INT32_MAX)
            return lk_fail(handle, LK_INVALID_ARGUMENT, "%s is %lld, not between %lld and %d", sizes[i].name,
                           (long long)sizes[i].value, (long long)sizes[i].least, INT32_MAX);
    return LK_OK;
}

lk_status lk_check_pointers(lk_handle *handle, const struct lk_pointer *pointers, int count) {
    for (int i = 0; i < count; i++)
        if (!pointers[i].value) return lk_fail(handle, LK_INVALID_ARGUMENT, "%s is NULL", pointers[i].name);
    return LK_OK;
}

const char *lk_pointer_type(lk_dtype dtype) {
    switch (dtype) {
    case LK_FLOAT32: return "*fp32";
    case LK_FLOAT16: return "*fp16";
    case LK_BFLOAT16: return "*bf16";
    case LK_FLOAT8_E4M3: return "*i8"; /* its bits */
    }
    return NULL;
}

