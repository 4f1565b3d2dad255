// Image features projected and put, with the text embeddings, at their places in the sequence. Arguments are checked.
#include <cstring>

#include "handle.h"

using namespace lk;

namespace {

// The features as rows (patches, channels) that lie one stride apart, copied only where the images do not follow each
// other so.
struct Rows {
    const void *x;
    int64_t stride;
};
Rows rows_of(const lk_project_splice_args &args, int64_t patches, int64_t image_stride, int64_t patch_stride,
             Buffer<char> &copy) {
    if (args.images == 1 || image_stride == args.image_patches * patch_stride) return {args.features, patch_stride};
    const int64_t size = size_of(args.dtype), bytes = args.channels * size;
    char *to = copy.at_least(patches * bytes);
    for (int64_t p = 0; p < patches; p++) {
        const int64_t at = p / args.image_patches * image_stride + p % args.image_patches * patch_stride;
        std::memcpy(to + p * bytes, static_cast<const char *>(args.features) + at * size, (size_t)bytes);
    }
    return {to, args.channels};
}

// Rows start.. of the features; at most so many at once, which keeps their copy in floats small.
constexpr int64_t AT_ONCE = 1024;
void project(lk_cpu &cpu, const lk_project_splice_args &args, const Rows &features, int64_t start, int64_t patches) {
    lk_weight weight{};
    weight.format = args.dtype == LK_FLOAT32 ? LK_WEIGHT_FLOAT32 : LK_WEIGHT_BFLOAT16;
    weight.out_features = args.width, weight.in_features = args.channels, weight.data = args.weight;
    constexpr int64_t PART = 48;
    const int64_t size = size_of(args.dtype), each = (ROW_BLOCK + 1) * PART;
    const char *x = static_cast<const char *>(features.x) + start * features.stride * size;
    const Panel &panel = prepare(cpu, cpu.panel, weight, {args.dtype, x, features.stride, nullptr, nullptr, 0, args.dtype == LK_BFLOAT16}, patches);
    float *scratch = cpu.scratch.at_least(each * cpu.pool->threads());
    share_product(cpu, patches, args.width, PART,
                  [&](int64_t row, int64_t rows, int64_t first, int64_t count, int thread) {
        float *some = scratch + thread * each, *bias = some + ROW_BLOCK * PART;
        for (int64_t n = first; n < first + count; n += PART) {
            const int64_t width = first + count - n < PART ? first + count - n : PART;
            if (args.bias) {
                cpu.isa->to_float(args.dtype, static_cast<const char *>(args.bias) + n * size, bias, width);
                for (int64_t m = 0; m < rows; m++) std::memcpy(some + m * PART, bias, (size_t)width * sizeof(float));
            }
            cpu.isa->products(weight, panel, row, rows, n, width, some, PART, args.bias != nullptr);
            for (int64_t m = 0; m < rows; m++)
                cpu.isa->from_float(args.dtype, some + m * PART,
                                    static_cast<char *>(args.out) + (args.image_rows[start + row + m] * args.width + n) * size,
                                    width);
        }
    });
}

} // namespace

extern "C" lk_status lk_cpu_project_splice(lk_handle *handle, const lk_project_splice_args *args, int64_t patches,
                                           int64_t image_stride, int64_t patch_stride) {
    if (lk_status status = check_dtype(handle, "project_splice", args->dtype)) return status;
    try {
        lk_cpu &cpu = *handle->cpu;
        Buffer<char> copy;
        const Rows features = patches ? rows_of(*args, patches, image_stride, patch_stride, copy) : Rows{};
        for (int64_t start = 0; start < patches; start += AT_ONCE)
            project(cpu, *args, features, start, patches - start < AT_ONCE ? patches - start : AT_ONCE);
        const int64_t bytes = args->width * size_of(args->dtype);
        for (int64_t i = 0; i < args->texts; i++) {
            const int64_t row = args->text_rows[i];
            std::memcpy(static_cast<char *>(args->out) + row * bytes,
                        static_cast<const char *>(args->embedding) + args->input_ids[row] * bytes, (size_t)bytes);
        }
        return LK_OK;
    } catch (const std::exception &error) {
        return lk_fail(handle, LK_OUT_OF_MEMORY, "%s", error.what());
    }
}
