#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "library.h"

/* Operations list values in the kernels' order, so the place looked at first is nearly always the right one. */
static const struct lk_value *value_of(const struct lk_values *values, int place, const char *name) {
    for (int i = 0, at = place; i < values->count; i++, at++) {
        if (at >= values->count) at = 0;
        const struct lk_value *value = &values->of[at];
        if (value->name[0] == name[0] && strcmp(value->name, name) == 0) return value;
    }
    return NULL;
}

/* 1, and the words where they are wanted: while a kernel is looked for, every launch passes here with `why` NULL. */
enum { WORDS = 256 };
#define SAY(why, ...) ((why) ? snprintf(why, WORDS, __VA_ARGS__) > 0 : 1)

/* Whether the value cannot be given for the argument, and why. */
static int refuses(const struct lk_argument *argument, const struct lk_value *value, char *why) {
    const char *name = argument->name, *type = argument->type;
    int pointer = type[0] == '*', number = type[0] == 'f', narrow = strcmp(type, "i32") == 0;
    if (!value)
        return SAY(why, "it has an argument %s", name);
    if ((value->kind == LK_VALUE_POINTER) != pointer || (value->kind == LK_VALUE_FLOAT) != number)
        return SAY(why, "its argument %s is of type %s", name, type);
    if (pointer && !value->pointer)
        return SAY(why, "it needs %s", name);
    if (pointer && value->type && strcmp(value->type, type) != 0)
        return SAY(why, "its %s is of type %s, not %s", name, type, value->type);
    if (pointer && argument->aligned && (uintptr_t)value->pointer % 16)
        return SAY(why, "it needs %s aligned to 16 bytes", name);
    if (narrow && value->integer != (int32_t)value->integer)
        return SAY(why, "its %s is of 32 bits, %lld is too large", name, (long long)value->integer);
    if (!pointer && !number && argument->aligned && value->integer % 16)
        return SAY(why, "it needs %s to be a multiple of 16, not %lld", name, (long long)value->integer);
    return 0;
}

/* Whether the value differs from the one that the kernel was compiled for, and how. */
static int differs(const struct lk_constant *constant, const struct lk_value *value, char *why) {
    if (constant->kind == LK_INTEGER && value->kind == LK_VALUE_INTEGER && value->integer != constant->value)
        return SAY(why, "it was compiled for %s = %lld, not %lld", constant->name,
                        (long long)constant->value, (long long)value->integer);
    if (constant->kind == LK_NONE && value->kind == LK_VALUE_POINTER && value->pointer)
        return SAY(why, "it was compiled without %s", constant->name);
    return 0;
}

/* In how many things kernel and values do not agree; the last of them in `why`. Without `why` it stops at one. */
static int disagreements(const struct lk_kernel *kernel, const struct lk_values *values, char *why) {
    const struct lk_constant warps = {"num_warps", LK_INTEGER, kernel->num_warps};
    const struct lk_value *value = value_of(values, 0, warps.name);
    int found = value && differs(&warps, value, why);
    for (int i = 0; i < kernel->constant_count && (why || !found); i++) {
        value = value_of(values, kernel->argument_count + i, kernel->constants[i].name);
        found += value && differs(&kernel->constants[i], value, why);
    }
    for (int i = 0; i < kernel->argument_count && (why || !found); i++) {
        value = value_of(values, i, kernel->arguments[i].name);
        found += refuses(&kernel->arguments[i], value, why);
    }
    return found;
}

void lk_add_blocks(const lk_handle *handle, const char *op, int64_t size, struct lk_values *values) {
    for (int i = 0; i < lk_tile_count; i++) {
        const struct lk_tile *tile = &lk_tiles[i];
        if (tile->arch != handle->arch || size > tile->up_to || strcmp(tile->op, op) != 0) continue;
        for (int j = 0; j < tile->block_count && values->count < MAX_VALUES; j++)
            values->of[values->count++] = (struct lk_value)INTEGER(tile->blocks[j].name, tile->blocks[j].value);
        return;
    }
}

int64_t lk_integer(const struct lk_values *values, const char *name) {
    const struct lk_value *value = value_of(values, 0, name);
    return value ? value->integer : 1;
}

lk_status lk_find(lk_handle *handle, const char *function, const struct lk_values *values,
                  const struct lk_kernel **found) {
    for (int i = 0; i < lk_kernel_count; i++)
        if (handle->functions[i] && strcmp(lk_kernels[i].function, function) == 0 &&
            disagreements(&lk_kernels[i], values, NULL) == 0)
            return *found = &lk_kernels[i], LK_OK;

    char why[WORDS], nearest[WORDS];
    int fewest = INT_MAX;
    const struct lk_kernel *near = NULL;
    for (int i = 0; i < lk_kernel_count; i++) {
        if (!handle->functions[i] || strcmp(lk_kernels[i].function, function) != 0) continue;
        int count = disagreements(&lk_kernels[i], values, why);
        if (count >= fewest) continue;
        fewest = count, near = &lk_kernels[i];
        memcpy(nearest, why, WORDS);
    }
    if (!near) return lk_fail(handle, LK_UNSUPPORTED, "%s was not compiled for this card", function);
    return lk_fail(handle, LK_UNSUPPORTED, "no compiled kernel fits; the nearest, %s: %s", near->name, nearest);
}

/* The bytes of a scalar or pointer at the start of its 8: the driver reads as many as the kernel's parameter has. */
static uint64_t packed(const char *type, const struct lk_value *value) {
    uint64_t bytes = 0;
    if (type[0] == '*')
        bytes = (uint64_t)(uintptr_t)value->pointer;
    else if (strcmp(type, "fp32") == 0)
        memcpy(&bytes, &(float){(float)value->number}, sizeof(float));
    else
        bytes = (uint64_t)value->integer; /* little-endian, as every host of an NVIDIA card is */
    return bytes;
}

lk_status lk_launch(lk_handle *handle, const struct lk_kernel *kernel, const struct lk_values *values, int64_t grid_x,
                    int64_t grid_y, int64_t grid_z, lk_stream stream) {
    uint64_t bytes[MAX_VALUES + 2] = {0}; /* as many as the kernel has arguments, and two scratch pointers, NULL */
    void *parameters[MAX_VALUES + 2];
    if (grid_x > INT32_MAX || grid_y > 65535 || grid_z > 65535)
        return lk_fail(handle, LK_INVALID_ARGUMENT, "%s: a grid of %lld x %lld x %lld is too large", kernel->name,
                       (long long)grid_x, (long long)grid_y, (long long)grid_z);
    if (grid_x <= 0 || grid_y <= 0 || grid_z <= 0) return LK_OK;
    for (int i = 0; i < kernel->argument_count; i++)
        bytes[i] = packed(kernel->arguments[i].type, value_of(values, i, kernel->arguments[i].name));
    for (int i = 0; i < kernel->argument_count + 2; i++) parameters[i] = &bytes[i];

    const struct driver *driver = handle->driver;
    CUresult result = driver->context_push(handle->context);
    if (result) return lk_cuda_failed(handle, "cuCtxPushCurrent", result);
    result = driver->launch(handle->functions[kernel - lk_kernels], (unsigned)grid_x, (unsigned)grid_y,
                            (unsigned)grid_z, 32 * (unsigned)kernel->num_warps, 1, 1, kernel->shared_bytes,
                            (CUstream)stream, parameters, NULL);
    driver->context_pop(&(CUcontext){0});
    return result ? lk_cuda_failed(handle, kernel->name, result) : LK_OK;
}
