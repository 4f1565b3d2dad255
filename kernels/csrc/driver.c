#include "driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>

static struct driver driver;
static char problem[256];

static void load(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL); /* never closed: the process may use it elsewhere */
    if (!library) {
        snprintf(problem, sizeof problem, "no CUDA driver: %s", dlerror());
        return;
    }
    const struct {
        void *target; /* which pointer in `driver` */
        const char *name;
    } symbols[] = {
        {&driver.init, "cuInit"},
        {&driver.get_error_string, "cuGetErrorString"},
        {&driver.device_count, "cuDeviceGetCount"},
        {&driver.device_get, "cuDeviceGet"},
        {&driver.device_attribute, "cuDeviceGetAttribute"},
        {&driver.context_retain, "cuDevicePrimaryCtxRetain"},
        {&driver.context_release, "cuDevicePrimaryCtxRelease_v2"},
        {&driver.context_push, "cuCtxPushCurrent_v2"},
        {&driver.context_pop, "cuCtxPopCurrent_v2"},
        {&driver.module_load, "cuModuleLoadData"},
        {&driver.module_unload, "cuModuleUnload"},
        {&driver.module_function, "cuModuleGetFunction"},
        {&driver.function_set, "cuFuncSetAttribute"},
        {&driver.launch, "cuLaunchKernel"},
    };
    for (size_t i = 0; i < sizeof symbols / sizeof symbols[0]; i++) {
        void *symbol = dlsym(library, symbols[i].name);
        if (!symbol) {
            snprintf(problem, sizeof problem, "the CUDA driver is too old: it has no %s", symbols[i].name);
            return;
        }
        *(void **)symbols[i].target = symbol;
    }
}

const struct driver *lk_driver(char *message, size_t size) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, load);
    if (!problem[0]) return &driver;
    snprintf(message, size, "%s", problem);
    return NULL;
}
