/* The compiled kernels that the library carries and their block sizes: tables that llava_kernels.aot writes (embed.py). */
#ifndef LK_KERNELS_H
#define LK_KERNELS_H

#include <stdint.h>

struct lk_argument {
    const char *name;
    const char *type; /* Triton's: "*bf16", "i32", "fp32", ... */
    int aligned;      /* compiled for multiples of 16 */
};

struct lk_constant {
    const char *name;
    enum { LK_INTEGER, LK_NONE, LK_OTHER } kind; /* LK_NONE: a pointer that this kernel does without */
    int64_t value;
};

struct lk_kernel {
    const char *name;     /* of the build, "rms_norm_forward_bf16_4096" */
    const char *function; /* of the source, "_rms_norm_forward_kernel" */
    const char *entry;    /* in the image */
    int arch;             /* 80, 90 */
    int num_warps;
    unsigned shared_bytes;
    int argument_count;
    const struct lk_argument *arguments; /* in the kernel's order; two scratch pointers follow, NULL in all of ours */
    int constant_count;
    const struct lk_constant *constants;
    const void *image;
};

/* A row of tiles.TABLE: the block sizes of an op for sizes up to a bound. */
struct lk_tile {
    const char *op;
    int arch;
    int64_t up_to;
    int block_count;
    struct {
        const char *name;
        int value;
    } blocks[12];
};

extern const struct lk_kernel lk_kernels[];
extern const int lk_kernel_count;
extern const struct lk_tile lk_tiles[];
extern const int lk_tile_count;

#endif
