/* A CUDA driver for tests: it has the devices that fake_state says, accepts cubins and remembers the last launch. */
#include "fake_cuda.h"

#include <elf.h>
#include <stdlib.h>
#include <string.h>

struct fake_state fake_state = {.devices = 1, .major = 9};

struct module {
    const unsigned char *image;
};

struct function {
    char name[128];
    int shared_limit, parameter_count;
    unsigned sizes[64]; /* bytes of each parameter */
};

int cuInit(unsigned flags) { return flags ? 1 : fake_state.devices ? 0 : 100; }

int cuGetErrorString(int code, const char **words) {
    *words = code == 700 ? "an illegal memory access was encountered" : "some error";
    return 0;
}

int cuDeviceGetCount(int *count) {
    *count = fake_state.devices;
    return 0;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal < fake_state.devices ? 0 : 101;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    switch (attribute) {
    case 16: *value = 100; return 0;
    case 75: *value = fake_state.major; return 0;
    case 76: *value = fake_state.minor; return 0;
    case 97: *value = (fake_state.major == 9 ? 227 : fake_state.minor ? 99 : 163) * 1024; return 0;
    }
    return 1;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    (void)device;
    fake_state.contexts++;
    *context = &fake_state;
    return 0;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    (void)device;
    fake_state.contexts--;
    return 0;
}

int cuCtxPushCurrent_v2(void *context) {
    fake_state.depth++;
    return context == &fake_state ? 0 : 201;
}

int cuCtxPopCurrent_v2(void **context) {
    *context = &fake_state;
    return fake_state.depth-- > 0 ? 0 : 201;
}

int cuModuleLoadData(void **module, const void *image) {
    if (!fake_state.depth) return 201;
    if (memcmp(image, "\177ELF", 4) != 0) return 200;
    struct module *made = malloc(sizeof *made);
    made->image = image;
    *module = made;
    fake_state.modules++;
    return 0;
}

int cuModuleUnload(void *module) {
    free(module);
    fake_state.modules--;
    return fake_state.depth ? 0 : 201;
}

/* A section of a 64-bit ELF file by its name, and its size; NULL: there is none. */
static const unsigned char *section(const unsigned char *elf, const char *name, uint64_t *size) {
    const Elf64_Ehdr *header = (const void *)elf;
    const Elf64_Shdr *sections = (const void *)(elf + header->e_shoff);
    const char *names = (const char *)elf + sections[header->e_shstrndx].sh_offset;
    for (int i = 0; i < header->e_shnum; i++)
        if (strcmp(names + sections[i].sh_name, name) == 0)
            return *size = sections[i].sh_size, elf + sections[i].sh_offset;
    return NULL;
}

/* The parameters' sizes out of the function's .nv.info: entries of (format, attribute, size), 4 and 0x17 for those. */
static void read_parameters(struct function *function, const unsigned char *info, uint64_t bytes) {
    for (uint64_t at = 0; at + 4 <= bytes;) {
        unsigned length = info[at] == 4 ? info[at + 2] | info[at + 3] << 8 : 0;
        if (info[at] == 4 && info[at + 1] == 0x17) {
            uint16_t ordinal;
            uint32_t bits;
            memcpy(&ordinal, info + at + 8, 2);
            memcpy(&bits, info + at + 12, 4);
            function->sizes[ordinal] = bits >> 18;
            function->parameter_count++;
        }
        at += 4 + length;
    }
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
    char section_name[160] = ".nv.info.";
    strcat(section_name, name);
    uint64_t bytes;
    const unsigned char *info = section(((struct module *)module)->image, section_name, &bytes);
    if (!info) return 500; /* the cubin has no such function */
    struct function *made = calloc(1, sizeof *made); /* never freed, for simplicity */
    strcpy(made->name, name);
    made->shared_limit = 48 * 1024;
    read_parameters(made, info, bytes);
    *function = made;
    return 0;
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
    int limit;
    cuDeviceGetAttribute(&limit, 97, 0);
    if (attribute != 8 || value > limit) return 1;
    ((struct function *)function)->shared_limit = value;
    return 0;
}

int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    struct function *f = function;
    struct fake_launch *last = &fake_state.last;
    if (fake_state.fail_launch) return fake_state.fail_launch;
    if (!fake_state.depth || extra || by != 1 || bz != 1 || shared > (unsigned)f->shared_limit) return 1;
    fake_state.launches++;
    strcpy(last->entry, f->name);
    last->grid[0] = x, last->grid[1] = y, last->grid[2] = z;
    last->block_x = bx, last->shared_bytes = shared, last->stream = stream;
    last->parameter_count = f->parameter_count;
    for (int i = 0; i < f->parameter_count; i++) {
        last->parameters[i] = 0;
        memcpy(&last->parameters[i], parameters[i], f->sizes[i]);
    }
    return 0;
}
