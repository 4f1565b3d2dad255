// The vision tower in one call, some images at a time.
#include <cstring>

#include "handle.h"

using namespace lk;

namespace {

constexpr int64_t AT_ONCE = 2048; // rows, or one image's: what lies between two products stays small

lk_status check(lk_handle *handle, const lk_vision_args &args) {
    CHECK_SIZES(handle, {"layers", args.layers, 0}, {"width", args.width, 1}, {"heads", args.heads, 1},
                {"images", args.images, 0}, {"patch", args.patch, 1}, {"grid", args.grid, 1});
    if (args.width % args.heads || args.width / args.heads > MAX_HEAD_DIM)
        return lk_fail(handle, LK_UNSUPPORTED, "%lld heads in a width of %lld: it must be a multiple, and a head at most 256",
                       (long long)args.heads, (long long)args.width);
    if (args.images == 0) return LK_OK;
    if (lk_status status = check_weight(handle, "patch_embedding", args.patch_embedding)) return status;
    if (args.patch_embedding.out_features != args.width || args.patch_embedding.in_features != 3 * args.patch * args.patch)
        return lk_fail(handle, LK_INVALID_ARGUMENT, "patch_embedding is (%lld, %lld), not (%lld, %lld)",
                       (long long)args.patch_embedding.out_features, (long long)args.patch_embedding.in_features,
                       (long long)args.width, (long long)(3 * args.patch * args.patch));
    CHECK_POINTERS(handle, {"class_embedding", args.class_embedding}, {"position_embedding", args.position_embedding},
                   {"norm_weight", args.norm_weight}, {"norm_bias", args.norm_bias}, {"pixels", args.pixels},
                   {"out", args.out}, {"layer", args.layers ? static_cast<const void *>(args.layer) : args.pixels});
    for (int64_t i = 0; i < args.layers; i++) {
        const lk_vision_layer &layer = args.layer[i];
        const int64_t width = args.width, inner = layer.fc1.out_features;
        const struct {
            const char *name;
            const lk_weight &weight;
            const void *bias;
            int64_t out, in;
        } products[] = {{"qkv", layer.qkv, layer.qkv_bias, 3 * width, width},
                        {"out", layer.out, layer.out_bias, width, width},
                        {"fc1", layer.fc1, layer.fc1_bias, inner, width},
                        {"fc2", layer.fc2, layer.fc2_bias, width, inner}};
        for (const auto &one : products) {
            if (lk_status status = check_weight(handle, one.name, one.weight)) return status;
            if (one.weight.out_features != one.out || one.weight.in_features != one.in)
                return lk_fail(handle, LK_INVALID_ARGUMENT, "%s is (%lld, %lld), not (%lld, %lld)", one.name,
                               (long long)one.weight.out_features, (long long)one.weight.in_features, (long long)one.out,
                               (long long)one.in);
            CHECK_POINTERS(handle, {one.name, one.bias});
        }
        CHECK_POINTERS(handle, {"norm1_weight", layer.norm1_weight}, {"norm1_bias", layer.norm1_bias},
                       {"norm2_weight", layer.norm2_weight}, {"norm2_bias", layer.norm2_bias});
    }
    return LK_OK;
}

// out (rows, features) (+)= source W^T + bias (or NULL), through quick GELU where that is asked for.
void multiply(lk_cpu &cpu, const lk_weight &weight, const Source &source, int64_t rows, const float *bias, bool gelu,
              float *out, bool add) {
    const int64_t width = weight.out_features;
    const Panel &panel = prepare(cpu, cpu.panel, weight, source, rows);
    share_product(cpu, rows, width, unit_of(panel, 12), [&](int64_t row, int64_t count, int64_t first, int64_t features, int) {
        float *to = out + row * width + first;
        cpu.isa->products(weight, panel, row, count, first, features, to, width, add);
        if (bias) cpu.isa->biased(to, width, count, features, bias + first, gelu);
    });
}

void attend(lk_cpu &cpu, int64_t images, int64_t tokens, int64_t heads, int64_t dim, const float *qkv, float *out) {
    const int64_t width = heads * dim, each = flash_scratch(tokens, dim, false);
    float *scratch = cpu.scratch.at_least(each * cpu.pool->threads());
    float *lse = cpu.vision.lse.at_least(images * heads * tokens); // nobody reads it
    cpu.pool->each(images * heads, [&](int64_t i, int thread) {
        const int64_t image = i / heads, head = i % heads;
        const float *q = qkv + image * tokens * 3 * width + head * dim;
        VarlenAttention task{};
        task.dtype = LK_FLOAT32, task.tokens = tokens, task.group = 1, task.head_dim = dim;
        task.q = q, task.k = q + width, task.v = q + 2 * width;
        task.q_token = task.k_token = task.v_token = 3 * width, task.q_head = dim;
        task.out = out + image * tokens * width + head * dim, task.out_token = width;
        task.lse = lse + i * tokens, task.lse_head = tokens;
        cpu.isa->varlen_attention(task, scratch + thread * each);
    });
}

// An image's patches, one a row: (grid * grid, 3 * patch * patch).
void cut(const float *pixels, int64_t patch, int64_t grid, float *out) {
    const int64_t side = grid * patch;
    for (int64_t i = 0; i < grid * grid; i++)
        for (int64_t line = 0; line < 3 * patch; line++, out += patch) {
            const int64_t channel = line / patch, y = i / grid * patch + line % patch;
            std::memcpy(out, pixels + (channel * side + y) * side + i % grid * patch, (size_t)patch * sizeof(float));
        }
}

// x (images, 1 + grid * grid, width): what the first layer gets.
void embed(lk_cpu &cpu, const lk_vision_args &args, const float *pixels, int64_t images, float *x) {
    const int64_t width = args.width, patches = args.grid * args.grid, size = 3 * args.patch * args.patch;
    float *rows = cpu.vision.pixels.at_least(images * patches * size);
    float *found = cpu.vision.projected.at_least(images * patches * width);
    float *positions = cpu.vision.vectors.at_least((1 + patches + 2) * width);
    float *norm = positions + (1 + patches) * width, *shift = norm + width;
    cpu.pool->each(images, [&](int64_t i, int) { cut(pixels + i * patches * size, args.patch, args.grid, rows + i * patches * size); });
    multiply(cpu, args.patch_embedding, {LK_FLOAT32, rows, size, nullptr, nullptr, 0, args.dtype == LK_BFLOAT16},
             images * patches, nullptr, false, found, false);
    cpu.isa->to_float(args.dtype, args.position_embedding, positions, (1 + patches) * width);
    cpu.isa->to_float(args.dtype, args.norm_weight, norm, width);
    cpu.isa->to_float(args.dtype, args.norm_bias, shift, width);
    cpu.pool->each(images, [&](int64_t i, int) {
        float *own = x + i * (1 + patches) * width;
        cpu.isa->to_float(args.dtype, args.class_embedding, own, width);
        std::memcpy(own + width, found + i * patches * width, (size_t)(patches * width) * sizeof(float));
        cpu.isa->biased(own, 0, 1, (1 + patches) * width, positions, false);
        cpu.isa->layer_norm(own, 1 + patches, width, norm, shift, args.eps);
    });
}

void run_layer(lk_cpu &cpu, const lk_vision_args &args, const lk_vision_layer &layer, int64_t images, float *x) {
    const int64_t tokens = 1 + args.grid * args.grid, rows = images * tokens;
    const int64_t width = args.width, inner = layer.fc1.out_features;
    float *vector = cpu.vision.vectors.at_least(9 * width + inner);
    auto floats = [&](const void *from, int64_t count) {
        cpu.isa->to_float(args.dtype, from, vector, count);
        return (vector += count) - count;
    };
    const bool half = args.dtype == LK_BFLOAT16;
    float *qkv = cpu.vision.projected.at_least(rows * 3 * width), *attended = cpu.vision.attended.at_least(rows * width);
    float *gated = cpu.vision.inner.at_least(rows * inner);
    const float *norm1 = floats(layer.norm1_weight, width), *shift1 = floats(layer.norm1_bias, width);
    multiply(cpu, layer.qkv, {LK_FLOAT32, x, width, norm1, shift1, args.eps, half}, rows, floats(layer.qkv_bias, 3 * width),
             false, qkv, false);
    attend(cpu, images, tokens, args.heads, width / args.heads, qkv, attended);
    multiply(cpu, layer.out, {LK_FLOAT32, attended, width, nullptr, nullptr, 0, half}, rows, floats(layer.out_bias, width),
             false, x, true);
    const float *norm2 = floats(layer.norm2_weight, width), *shift2 = floats(layer.norm2_bias, width);
    multiply(cpu, layer.fc1, {LK_FLOAT32, x, width, norm2, shift2, args.eps, half}, rows, floats(layer.fc1_bias, inner), true,
             gated, false);
    multiply(cpu, layer.fc2, {LK_FLOAT32, gated, inner, nullptr, nullptr, 0, half}, rows, floats(layer.fc2_bias, width), false,
             x, true);
}

} // namespace

extern "C" lk_status lk_vision_tower(lk_handle *handle, const lk_vision_args *args) {
    if (lk_status status = cpu_only(handle)) return status;
    if (lk_status status = lk_check_call(handle, args, args ? args->dtype : LK_FLOAT32)) return status;
    if (lk_status status = check_dtype(handle, "a vision tower", args->dtype)) return status;
    if (lk_status status = check(handle, *args)) return status;
    return guarded(handle, [&] {
        lk_cpu &cpu = *handle->cpu;
        const int64_t patches = args->grid * args->grid, tokens = 1 + patches, size = tokens * args->width;
        const int64_t together = tokens < AT_ONCE ? AT_ONCE / tokens : 1, pixels = 3 * patches * args->patch * args->patch;
        for (int64_t first = 0; first < args->images; first += together) {
            const int64_t images = args->images - first < together ? args->images - first : together;
            float *x = cpu.vision.stream.at_least(images * size);
            embed(cpu, *args, args->pixels + first * pixels, images, x);
            for (int64_t i = 0; i < args->layers; i++) run_layer(cpu, *args, args->layer[i], images, x);
            cpu.isa->from_float(args->dtype, x, static_cast<char *>(args->out) + first * size * size_of(args->dtype),
                                images * size);
        }
        return LK_OK;
    });
}
