/* The handle, its error message, and launching a kernel by the names of its arguments. */
#ifndef LK_LIBRARY_H
#define LK_LIBRARY_H

#include "driver.h"
#include "kernels.h"
#include "llava_kernels.h"

struct lk_handle {
    int device; /* LK_CPU or CUDA's ordinal */
    int arch;   /* of the kernels that the card runs */
    int multiprocessors;
    const struct driver *driver;
    CUdevice cuda_device;
    CUcontext context;
    CUmodule *modules; /* (lk_kernel_count,), NULL where a kernel is for other cards */
    CUfunction *functions;
    struct lk_cpu *cpu; /* of LK_CPU */
    char message[512];
};

/* Keeps the message for lk_last_error and returns `status`. */
lk_status lk_fail(lk_handle *handle, lk_status status, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* LK_CUDA, with the driver's words for `result`. */
lk_status lk_cuda_failed(lk_handle *handle, const char *call, CUresult result);

/* What an operation gives a kernel: run-time arguments and the constants that it must have been compiled for. */
struct lk_value {
    const char *name;
    enum { LK_VALUE_POINTER, LK_VALUE_INTEGER, LK_VALUE_FLOAT } kind;
    const char *type; /* of a pointer: "*bf16"; NULL stands for any */
    const void *pointer;
    int64_t integer;
    double number;
};

enum { MAX_VALUES = 48 };

struct lk_values {
    int count;
    struct lk_value of[MAX_VALUES];
};

#define POINTER(name, type, value) {name, LK_VALUE_POINTER, type, value, 0, 0}
#define INTEGER(name, value) {name, LK_VALUE_INTEGER, NULL, NULL, value, 0}
#define FLOAT(name, value) {name, LK_VALUE_FLOAT, NULL, NULL, 0, value}

#define VALUES(...) {(int)(sizeof((struct lk_value[]){__VA_ARGS__}) / sizeof(struct lk_value)), {__VA_ARGS__}}

/* Adds the block sizes that the table has for `op` at `size`. */
void lk_add_blocks(const lk_handle *handle, const char *op, int64_t size, struct lk_values *values);

/* The integer of this name; 1 where there is none. */
int64_t lk_integer(const struct lk_values *values, const char *name);

/* The first kernel of `function` for this card whose constants, types and alignments agree with the values. */
lk_status lk_find(lk_handle *handle, const char *function, const struct lk_values *values,
                  const struct lk_kernel **found);

lk_status lk_launch(lk_handle *handle, const struct lk_kernel *kernel, const struct lk_values *values, int64_t grid_x,
                    int64_t grid_y, int64_t grid_z, lk_stream stream);

#endif
