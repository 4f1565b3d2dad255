/* Puts two images of three patches and four words together by lk_project_splice: on the CPU in float32, checked against
 * a computation in double; and, where there is a GPU, on it in bfloat16, checked against the CPU's result. */
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llava_kernels.h"

enum { IMAGES = 2, PATCHES = 3, ROWS = IMAGES * PATCHES, TEXTS = 4, TOKENS = ROWS + TEXTS };
enum { CHANNELS = 1024, WIDTH = 4096, VOCABULARY = 50 };

static float features[IMAGES][1 + PATCHES][CHANNELS]; /* each image begins with a class token, which is left out */
static float weight[WIDTH][CHANNELS], bias[WIDTH], embedding[VOCABULARY][WIDTH], out[TOKENS][WIDTH];
static const int64_t input_ids[TOKENS] = {1, 7, -200, -200, -200, 9, -200, -200, -200, 2}; /* -200 marks an image's row */
static const int32_t image_rows[ROWS] = {2, 3, 4, 6, 7, 8}, text_rows[TEXTS] = {0, 1, 5, 9};

/* Numbers in (-scale, scale) that bfloat16 holds exactly, so that both precisions start from the same. */
static void fill(float *values, size_t count, float scale) {
    static uint32_t state = 1;
    for (size_t i = 0; i < count; i++) {
        state = state * 1664525u + 1013904223u;
        values[i] = scale * (float)((int)(state >> 24) - 128) / 128;
    }
}

static lk_project_splice_args arguments(void) {
    return (lk_project_splice_args){
        .dtype = LK_FLOAT32, .images = IMAGES, .image_patches = PATCHES, .texts = TEXTS,
        .channels = CHANNELS, .width = WIDTH, .vocabulary = VOCABULARY,
        .features = features[0][1], .image_stride = (1 + PATCHES) * CHANNELS,
        .weight = weight, .bias = bias, .embedding = embedding,
        .input_ids = input_ids, .image_rows = image_rows, .text_rows = text_rows, .out = out,
    };
}

static int failed(const char *what, lk_status status, const lk_handle *handle) {
    printf("%s: %s (%s)\n", what, lk_error_string(status), lk_last_error(handle));
    return 1;
}

static int check_cpu(void) {
    lk_handle *handle;
    lk_status status = lk_create(&handle, LK_CPU);
    if (status) return failed("CPU", status, NULL);
    lk_project_splice_args args = arguments();
    status = lk_project_splice(handle, &args, NULL);
    if (status) return failed("CPU", status, handle);
    lk_destroy(handle);
    double worst = 0;
    for (int row = 0; row < ROWS; row++)
        for (int d = 0; d < WIDTH; d++) {
            double sum = bias[d];
            for (int c = 0; c < CHANNELS; c++)
                sum += (double)features[row / PATCHES][1 + row % PATCHES][c] * weight[d][c];
            const double off = fabs(sum - out[image_rows[row]][d]);
            if (worst == worst && !(off <= worst)) worst = off; /* a NaN is the worst, and stays it */
        }
    int texts = 1;
    for (int i = 0; i < TEXTS; i++)
        texts &= !memcmp(out[text_rows[i]], embedding[input_ids[text_rows[i]]], sizeof embedding[0]);
    printf("CPU: image rows within %.1e of the product in double, text rows %s\n", worst, texts ? "equal" : "DIFFER");
    return !(worst < 1e-4 && texts);
}

/* Device memory is the caller's own business. A program that has CUDA's headers would include them here. */
static struct {
    void *library;
    int (*allocate)(uint64_t *, size_t), (*to_device)(uint64_t, const void *, size_t);
    int (*to_host)(void *, uint64_t, size_t), (*retain)(void **, int), (*make_current)(void *);
} cuda;

static int open_cuda(void) {
    void *context;
    cuda.library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!cuda.library) return 0;
    *(void **)&cuda.allocate = dlsym(cuda.library, "cuMemAlloc_v2");
    *(void **)&cuda.to_device = dlsym(cuda.library, "cuMemcpyHtoD_v2");
    *(void **)&cuda.to_host = dlsym(cuda.library, "cuMemcpyDtoH_v2");
    *(void **)&cuda.retain = dlsym(cuda.library, "cuDevicePrimaryCtxRetain");
    *(void **)&cuda.make_current = dlsym(cuda.library, "cuCtxSetCurrent");
    return !cuda.retain(&context, 0) && !cuda.make_current(context);
}

static const void *on_device(const void *source, size_t bytes) {
    uint64_t pointer = 0;
    if (cuda.allocate(&pointer, bytes) || cuda.to_device(pointer, source, bytes)) exit((puts("GPU: out of memory"), 1));
    return (const void *)pointer;
}

static const void *on_device_bf16(const float *source, size_t count) {
    uint16_t *halves = malloc(count * sizeof *halves);
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, &source[i], sizeof bits);
        halves[i] = (uint16_t)(bits >> 16);
    }
    const void *pointer = on_device(halves, count * sizeof *halves);
    free(halves);
    return pointer;
}

static int check_gpu(void) {
    lk_handle *handle;
    lk_status status = lk_create(&handle, 0);
    if (status) {
        printf("GPU: %s (%s)\n", lk_error_string(status), lk_last_error(NULL));
        return status != LK_NO_DRIVER && status != LK_NO_DEVICE && status != LK_NO_KERNELS;
    }
    if (!open_cuda()) return puts("GPU: its memory cannot be reached"), 1;
    static uint16_t result[TOKENS][WIDTH];
    lk_project_splice_args args = arguments();
    args.dtype = LK_BFLOAT16;
    args.features = (const uint16_t *)on_device_bf16(&features[0][0][0], sizeof features / sizeof(float)) + CHANNELS;
    args.weight = on_device_bf16(&weight[0][0], sizeof weight / sizeof(float));
    args.bias = on_device_bf16(bias, WIDTH);
    args.embedding = on_device_bf16(&embedding[0][0], sizeof embedding / sizeof(float));
    args.input_ids = on_device(input_ids, sizeof input_ids);
    args.image_rows = on_device(image_rows, sizeof image_rows);
    args.text_rows = on_device(text_rows, sizeof text_rows);
    args.out = (void *)on_device(result, sizeof result);
    status = lk_project_splice(handle, &args, NULL);
    if (status) return failed("GPU", status, handle);
    if (cuda.to_host(result, (uint64_t)args.out, sizeof result)) return puts("GPU: the kernel failed"), 1;
    double worst = 0;
    for (int row = 0; row < TOKENS; row++)
        for (int d = 0; d < WIDTH; d++) {
            uint32_t bits = (uint32_t)result[row][d] << 16;
            float value;
            memcpy(&value, &bits, sizeof value);
            const double off = fabs((double)value - out[row][d]) / (1 + fabs((double)out[row][d]));
            if (worst == worst && !(off <= worst)) worst = off;
        }
    printf("GPU: within %.1e of the CPU's result, relative (bfloat16 holds 3.9e-3)\n", worst);
    lk_destroy(handle);
    return !(worst < 4e-3);
}

int main(void) {
    fill(&features[0][0][0], sizeof features / sizeof(float), 1);
    fill(&weight[0][0], sizeof weight / sizeof(float), 0.125f);
    fill(bias, WIDTH, 1);
    fill(&embedding[0][0], sizeof embedding / sizeof(float), 1);
    return check_cpu() | check_gpu();
}
