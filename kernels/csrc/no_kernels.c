/* In place of the tables that llava_kernels.aot writes, where it could not run. */
#include "kernels.h"

const struct lk_kernel lk_kernels[1];
const int lk_kernel_count = 0;
const struct lk_tile lk_tiles[1];
const int lk_tile_count = 0;
