/* The part of the CUDA driver that is used, found at run time, declared here so that no CUDA headers are needed. */
#ifndef LK_DRIVER_H
#define LK_DRIVER_H

#include <stddef.h>

typedef int CUresult;
typedef int CUdevice;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;

enum {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_NO_DEVICE = 100,
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
};

struct driver {
    CUresult (*init)(unsigned flags);
    CUresult (*get_error_string)(CUresult, const char **);
    CUresult (*device_count)(int *);
    CUresult (*device_get)(CUdevice *, int ordinal);
    CUresult (*device_attribute)(int *, int attribute, CUdevice);
    CUresult (*context_retain)(CUcontext *, CUdevice);
    CUresult (*context_release)(CUdevice);
    CUresult (*context_push)(CUcontext);
    CUresult (*context_pop)(CUcontext *);
    CUresult (*module_load)(CUmodule *, const void *image);
    CUresult (*module_unload)(CUmodule);
    CUresult (*module_function)(CUfunction *, CUmodule, const char *name);
    CUresult (*function_set)(CUfunction, int attribute, int value);
    CUresult (*launch)(CUfunction, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                       unsigned block_z, unsigned shared_bytes, CUstream, void **parameters, void **extra);
};

/* The driver, or NULL and why in `message`. */
const struct driver *lk_driver(char *message, size_t size);

#endif
