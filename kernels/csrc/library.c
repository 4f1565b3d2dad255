#include "library.h"

#include "cpu/cpu.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

static _Thread_local char create_message[512];

const char *lk_error_string(lk_status status) {
    switch (status) {
    case LK_OK: return "no error";
    case LK_INVALID_ARGUMENT: return "invalid argument";
    case LK_UNSUPPORTED: return "no kernel for these sizes or this type";
    case LK_NO_KERNELS: return "built without GPU kernels";
    case LK_NO_DRIVER: return "no usable CUDA driver";
    case LK_NO_DEVICE: return "no such device, or one that no kernels were compiled for";
    case LK_OUT_OF_MEMORY: return "out of memory";
    case LK_CUDA: return "the CUDA driver reported an error";
    }
    return "unknown error";
}

const char *lk_last_error(const lk_handle *handle) { return handle ? handle->message : create_message; }

lk_status lk_fail(lk_handle *handle, lk_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(handle->message, sizeof handle->message, format, arguments);
    va_end(arguments);
    return status;
}

lk_status lk_cuda_failed(lk_handle *handle, const char *call, CUresult result) {
    const char *words = NULL;
    handle->driver->get_error_string(result, &words);
    return lk_fail(handle, LK_CUDA, "%s: %s (%d)", call, words ? words : "unknown error", result);
}

static lk_status find_device(lk_handle *handle) {
    const struct driver *driver = handle->driver = lk_driver(handle->message, sizeof handle->message);
    if (!driver) return LK_NO_DRIVER;
    CUresult result = driver->init(0);
    if (result == CUDA_ERROR_NO_DEVICE) return lk_fail(handle, LK_NO_DEVICE, "the CUDA driver finds no device");
    if (result) return lk_cuda_failed(handle, "cuInit", result);
    int count = 0, major = 0, minor = 0;
    if ((result = driver->device_count(&count))) return lk_cuda_failed(handle, "cuDeviceGetCount", result);
    if (handle->device >= count)
        return lk_fail(handle, LK_NO_DEVICE, "device %d: there are %d", handle->device, count);
    if ((result = driver->device_get(&handle->cuda_device, handle->device)))
        return lk_cuda_failed(handle, "cuDeviceGet", result);
    driver->device_attribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle->cuda_device);
    driver->device_attribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle->cuda_device);
    driver->device_attribute(&handle->multiprocessors, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, handle->cuda_device);
    /* Code for 8.0 runs on every 8.x; code for 9.0 uses what only 9.0 has. */
    handle->arch = major == 8 ? 80 : major == 9 && minor == 0 ? 90 : 0;
    if (!handle->arch)
        return lk_fail(handle, LK_NO_DEVICE, "device %d has compute capability %d.%d; the kernels are for 8.x and 9.0",
                       handle->device, major, minor);
    return LK_OK;
}

/* All at once, so that no later call loads anything, which a graph capture would not allow. The context is current. */
static lk_status load_kernels(lk_handle *handle) {
    const struct driver *driver = handle->driver;
    int limit = 0;
    driver->device_attribute(&limit, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, handle->cuda_device);
    for (int i = 0; i < lk_kernel_count; i++) {
        const struct lk_kernel *kernel = &lk_kernels[i];
        /* An 8.6 or 8.9 card has less shared memory than 8.0: a kernel that does not fit there is left out. */
        if (kernel->arch != handle->arch || kernel->shared_bytes > (unsigned)limit) continue;
        CUresult result = driver->module_load(&handle->modules[i], kernel->image);
        if (result) return lk_cuda_failed(handle, kernel->name, result);
        result = driver->module_function(&handle->functions[i], handle->modules[i], kernel->entry);
        if (!result && kernel->shared_bytes > 48 * 1024)
            result = driver->function_set(handle->functions[i], CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                          (int)kernel->shared_bytes);
        if (result) return lk_cuda_failed(handle, kernel->name, result);
    }
    return LK_OK;
}

static lk_status open_device(lk_handle *handle) {
    if (lk_kernel_count == 0)
        return lk_fail(handle, LK_NO_KERNELS, "built without GPU kernels: Python with torch and triton was missing");
    lk_status status = find_device(handle);
    if (status) return status;
    handle->modules = calloc((size_t)lk_kernel_count, sizeof *handle->modules);
    handle->functions = calloc((size_t)lk_kernel_count, sizeof *handle->functions);
    if (!handle->modules || !handle->functions) return lk_fail(handle, LK_OUT_OF_MEMORY, "out of host memory");
    /* The primary context is the one that cudart, and so torch, uses. */
    CUresult result = handle->driver->context_retain(&handle->context, handle->cuda_device);
    if (result) return lk_cuda_failed(handle, "cuDevicePrimaryCtxRetain", result);
    if ((result = handle->driver->context_push(handle->context)))
        return lk_cuda_failed(handle, "cuCtxPushCurrent", result);
    status = load_kernels(handle);
    handle->driver->context_pop(&(CUcontext){0});
    return status;
}

lk_status lk_create(lk_handle **handle, int device) {
    create_message[0] = '\0';
    if (!handle) {
        snprintf(create_message, sizeof create_message, "handle is NULL");
        return LK_INVALID_ARGUMENT;
    }
    *handle = NULL;
    lk_handle *made = calloc(1, sizeof *made);
    if (!made) {
        snprintf(create_message, sizeof create_message, "out of host memory");
        return LK_OUT_OF_MEMORY;
    }
    made->device = device;
    lk_status status = LK_OK;
    if (device < LK_CPU)
        status = lk_fail(made, LK_INVALID_ARGUMENT, "device %d: neither LK_CPU nor an ordinal", device);
    else
        status = device == LK_CPU ? lk_cpu_open(made) : open_device(made);
    if (status) {
        snprintf(create_message, sizeof create_message, "%s", made->message);
        lk_destroy(made);
        return status;
    }
    *handle = made;
    return LK_OK;
}

void lk_destroy(lk_handle *handle) {
    if (!handle) return;
    if (handle->context) {
        handle->driver->context_push(handle->context);
        for (int i = 0; i < lk_kernel_count; i++)
            if (handle->modules[i]) handle->driver->module_unload(handle->modules[i]);
        handle->driver->context_pop(&(CUcontext){0});
        handle->driver->context_release(handle->cuda_device);
    }
    lk_cpu_close(handle->cpu);
    free(handle->modules);
    free(handle->functions);
    free(handle);
}
