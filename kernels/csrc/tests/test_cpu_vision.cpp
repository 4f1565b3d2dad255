// The vision tower against a plain loop in double: both types, several threads, under the instruction set that is named.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "numbers.h"

using Values = std::vector<double>;

// A matrix or a vector whose values keep the size of what they multiply.
struct Weight : Array {
    Weight(lk_dtype dtype, int64_t out, int64_t in) : Array(dtype, out * in), out(out), in(in) {
        const float factor = 1 / std::sqrt((float)in);
        for (float &value : wide) value *= factor;
        for (uint16_t &value : narrow) value = half(whole(value) * factor);
    }
    lk_weight described() {
        lk_weight weight{};
        weight.format = dtype == LK_FLOAT32 ? LK_WEIGHT_FLOAT32 : LK_WEIGHT_BFLOAT16;
        weight.out_features = out, weight.in_features = in, weight.data = data();
        return weight;
    }
    Values times(const Values &x, Array *bias) const {
        Values y;
        for (int64_t n = 0; n < out; n++) {
            double total = bias ? (*bias)[n] : 0;
            for (int64_t k = 0; k < in; k++) total += (*this)[n * in + k] * x[(size_t)k];
            y.push_back(total);
        }
        return y;
    }
    int64_t out, in;
};

struct Layer {
    Array norm1, shift1, norm2, shift2;
    Weight qkv, out, fc1, fc2;
    Array qkv_bias, out_bias, fc1_bias, fc2_bias;
    Layer(lk_dtype dtype, int64_t width, int64_t inner)
        : norm1(dtype, width), shift1(dtype, width), norm2(dtype, width), shift2(dtype, width), qkv(dtype, 3 * width, width),
          out(dtype, width, width), fc1(dtype, inner, width), fc2(dtype, width, inner), qkv_bias(dtype, 3 * width),
          out_bias(dtype, width), fc1_bias(dtype, inner), fc2_bias(dtype, width) {}
    lk_vision_layer described() {
        return {norm1.data(), shift1.data(), norm2.data(), shift2.data(), qkv.described(), out.described(),
                fc1.described(), fc2.described(), qkv_bias.data(), out_bias.data(), fc1_bias.data(), fc2_bias.data()};
    }
};

static Values normed(const Values &x, const Array &weight, const Array &shift) {
    double mean = 0, square = 0;
    for (double value : x) mean += value / (double)x.size();
    for (double value : x) square += (value - mean) * (value - mean) / (double)x.size();
    Values y;
    for (size_t i = 0; i < x.size(); i++)
        y.push_back((x[i] - mean) / std::sqrt(square + 1e-5) * weight[(int64_t)i] + shift[(int64_t)i]);
    return y;
}

static void add(Values &x, const Values &y) {
    for (size_t i = 0; i < x.size(); i++) x[i] += y[i];
}

static void run_layer(Layer &layer, std::vector<Values> &x, int64_t heads) { // of one image
    const size_t tokens = x.size(), width = x[0].size(), dim = width / (size_t)heads;
    std::vector<Values> qkv;
    for (const Values &row : x) qkv.push_back(layer.qkv.times(normed(row, layer.norm1, layer.shift1), &layer.qkv_bias));
    for (size_t t = 0; t < tokens; t++) {
        Values attended(width);
        for (size_t h = 0; h < (size_t)heads; h++) {
            Values weights;
            double total = 0;
            for (size_t u = 0; u < tokens; u++) {
                double score = 0;
                for (size_t d = 0; d < dim; d++) score += qkv[t][h * dim + d] * qkv[u][width + h * dim + d];
                weights.push_back(std::exp(score / std::sqrt((double)dim))), total += weights.back();
            }
            for (size_t u = 0; u < tokens; u++)
                for (size_t d = 0; d < dim; d++) attended[h * dim + d] += weights[u] / total * qkv[u][2 * width + h * dim + d];
        }
        add(x[t], layer.out.times(attended, &layer.out_bias));
        Values inner = layer.fc1.times(normed(x[t], layer.norm2, layer.shift2), &layer.fc1_bias);
        for (double &value : inner) value /= 1 + std::exp(-1.702 * value);
        add(x[t], layer.fc2.times(inner, &layer.fc2_bias));
    }
}

static void tower(lk_handle *handle, lk_dtype dtype, int64_t images, int64_t patch, int64_t grid, int64_t width, int64_t heads) {
    const int64_t patches = grid * grid, side = grid * patch, inner = 2 * width + 3;
    Weight embedding(dtype, width, 3 * patch * patch);
    Array first(dtype, width), positions(dtype, (1 + patches) * width), norm(dtype, width), shift(dtype, width);
    Array pixels(LK_FLOAT32, images * 3 * side * side), out(dtype, images * (1 + patches) * width, UNTOUCHED);
    Layer layers[2] = {{dtype, width, inner}, {dtype, width, inner}};
    const lk_vision_layer described[2] = {layers[0].described(), layers[1].described()};
    lk_vision_args args{};
    args.dtype = dtype, args.layers = 2, args.width = width, args.heads = heads, args.eps = 1e-5f;
    args.patch_embedding = embedding.described(), args.class_embedding = first.data();
    args.position_embedding = positions.data(), args.norm_weight = norm.data(), args.norm_bias = shift.data();
    args.layer = described, args.images = images, args.patch = patch, args.grid = grid, args.pixels = pixels.wide.data();
    args.out = out.data();
    CHECK(lk_vision_tower(handle, &args) == LK_OK);
    double off = 0, size = 0;
    for (int64_t image = 0; image < images; image++) {
        std::vector<Values> x;
        for (int64_t t = 0; t <= patches; t++) {
            Values row;
            if (t == 0) {
                for (int64_t i = 0; i < width; i++) row.push_back(first[i]);
            } else {
                Values seen;
                for (int64_t i = 0; i < 3 * patch * patch; i++) {
                    const int64_t channel = i / (patch * patch), y = (t - 1) / grid * patch + i / patch % patch;
                    seen.push_back(pixels[((image * 3 + channel) * side + y) * side + (t - 1) % grid * patch + i % patch]);
                }
                row = embedding.times(seen, nullptr);
            }
            for (int64_t i = 0; i < width; i++) row[(size_t)i] += positions[t * width + i];
            x.push_back(normed(row, norm, shift));
        }
        for (Layer &layer : layers) run_layer(layer, x, heads);
        for (int64_t t = 0; t <= patches; t++)
            for (int64_t i = 0; i < width; i++) {
                const double exact = x[(size_t)t][(size_t)i], found = out[(image * (1 + patches) + t) * width + i];
                off += (found - exact) * (found - exact), size += exact * exact;
            }
    }
    CHECK(std::sqrt(off / size) < (dtype == LK_FLOAT32 ? 2e-6 : 1e-2)); // of bfloat16 the result alone is rounded by 2e-3
}

int main(int count, char **words) {
    const char *name = count > 1 ? words[1] : "portable";
    lk_handle *handle;
    CHECK(lk_create(&handle, LK_CPU) == LK_OK);
    if (lk_set_instructions(handle, name) != LK_OK) return std::puts(lk_last_error(handle)), lk_destroy(handle), 77;
    for (int threads : {1, 3})
        for (lk_dtype dtype : {LK_FLOAT32, LK_BFLOAT16}) {
            CHECK(lk_set_threads(handle, threads) == LK_OK);
            tower(handle, dtype, 1, 1, 1, 2, 1);
            tower(handle, dtype, 2, 3, 2, 30, 3);
            tower(handle, dtype, 3, 2, 4, 64, 2);
            tower(handle, dtype, 5, 1, 21, 16, 1); // 442 tokens an image: not all images go at once
        }
    lk_vision_args none{};
    CHECK(lk_vision_tower(handle, nullptr) == LK_INVALID_ARGUMENT);
    CHECK(lk_vision_tower(handle, &none) == LK_INVALID_ARGUMENT); // a width of 0
    lk_destroy(handle);
    if (failures) std::printf("%d failures\n", failures);
    return failures != 0;
}
