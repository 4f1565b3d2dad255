/* The fake driver's own controls: found by dlsym in the libcuda.so.1 that the library loaded. */
#ifndef FAKE_CUDA_H
#define FAKE_CUDA_H

#include <stddef.h>
#include <stdint.h>

struct fake_launch {
    char entry[128];
    unsigned grid[3], block_x, shared_bytes;
    void *stream;
    int parameter_count; /* as the cubin itself says */
    uint64_t parameters[64];
};

struct fake_state {
    int devices, major, minor; /* what the machine has */
    int launches, modules, contexts, depth; /* counts; modules and contexts not given back, contexts pushed */
    int fail_launch; /* the code that the next launches return */
    struct fake_launch last;
};

#endif
