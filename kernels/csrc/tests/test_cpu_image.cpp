// Pictures against a plain loop over every pixel, to the bit, under the instruction set that is named. The loop is
// Pillow's arithmetic; that it is so is checked in Python, against Pillow.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "checking.h"
#include "llava_kernels.h"

static std::mt19937 generator(1);
static int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

struct Picture {
    Picture(int64_t height, int64_t width) : height(height), width(width), bytes((size_t)(height * width * 3)) {}
    uint8_t &at(int64_t y, int64_t x, int64_t c) { return bytes[(size_t)((y * width + x) * 3 + c)]; }
    int64_t height, width;
    std::vector<uint8_t> bytes;
};

static double bicubic(double x) {
    if (x < 0) x = -x;
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    if (x < 2) return (((x - 5) * x + 8) * x - 4) * -0.5;
    return 0;
}

static Picture in_width(Picture &from, int64_t width) {
    Picture to(from.height, width);
    const double scale = (double)from.width / (double)width, stretch = scale < 1 ? 1 : scale, reach = 2 * stretch;
    for (int64_t x = 0; x < width; x++) {
        const double centre = ((double)x + 0.5) * scale;
        const int64_t first = std::max((int64_t)(centre - reach + 0.5), (int64_t)0);
        const int64_t last = std::min((int64_t)(centre + reach + 0.5), from.width);
        std::vector<double> weights;
        double total = 0;
        for (int64_t i = first; i < last; i++) {
            weights.push_back(bicubic(((double)i - centre + 0.5) * (1 / stretch)));
            total += weights.back();
        }
        for (int64_t y = 0; y < from.height; y++)
            for (int64_t c = 0; c < 3; c++) {
                int32_t sum = 1 << 21;
                for (int64_t i = first; i < last; i++) {
                    const double weight = weights[(size_t)(i - first)] / total * (1 << 22);
                    sum += from.at(y, i, c) * (int32_t)(weight + (weight < 0 ? -0.5 : 0.5));
                }
                to.at(y, x, c) = (uint8_t)std::clamp(sum >> 22, 0, 255);
            }
    }
    return to;
}

static Picture turned(Picture &from) {
    Picture to(from.width, from.height);
    for (int64_t y = 0; y < from.height; y++)
        for (int64_t x = 0; x < from.width; x++)
            for (int64_t c = 0; c < 3; c++) to.at(x, y, c) = from.at(y, x, c);
    return to;
}

static Picture in_height(Picture &from, int64_t height) {
    Picture lying = turned(from), resized = in_width(lying, height);
    return turned(resized);
}

static std::vector<float> plain(const lk_prepare_image_args &args, Picture &picture) {
    Picture canvas(args.canvas_height, args.canvas_width);
    for (int64_t y = 0; y < canvas.height; y++)
        for (int64_t x = 0; x < canvas.width; x++)
            for (int64_t c = 0; c < 3; c++) {
                const int64_t row = y - args.top, column = x - args.left;
                const bool on = row >= 0 && row < args.height && column >= 0 && column < args.width;
                canvas.at(y, x, c) = on ? picture.at(row, column, c) : args.background[c];
            }
    Picture half = args.height_first ? in_height(canvas, args.new_height) : in_width(canvas, args.new_width);
    Picture whole = args.height_first ? in_width(half, args.new_width) : in_height(half, args.new_height);
    std::vector<float> out;
    for (int64_t c = 0; c < 3; c++)
        for (int64_t y = 0; y < args.size; y++)
            for (int64_t x = 0; x < args.size; x++) {
                const float product = whole.at(args.out_top + y, args.out_left + x, c) * args.scale[c];
                out.push_back(product + args.shift[c]);
            }
    return out;
}

// A picture in memory of exactly its size, which AddressSanitizer watches; its rows with room between them, the last one
// first where that is asked for.
struct Given {
    Given(Picture &picture, int64_t step, int64_t room, bool upside_down) {
        const int64_t row = picture.width * step + room;
        bytes.resize((size_t)((picture.height - 1) * row + picture.width * step), 200);
        for (int64_t y = 0; y < picture.height; y++)
            for (int64_t x = 0; x < picture.width; x++)
                for (int64_t c = 0; c < 3; c++)
                    bytes[(size_t)((upside_down ? picture.height - 1 - y : y) * row + x * step + c)] = picture.at(y, x, c);
        first = bytes.data() + (upside_down ? (picture.height - 1) * row : 0), stride = upside_down ? -row : row;
    }
    std::vector<uint8_t> bytes;
    const uint8_t *first;
    int64_t stride;
};

static lk_prepare_image_args described(Picture &picture, const Given &given, int64_t step, const char *name) {
    lk_prepare_image_args args{};
    args.pixels = given.first, args.height = picture.height, args.width = picture.width;
    args.row_stride = given.stride, args.pixel_stride = step, args.instructions = name;
    args.canvas_height = picture.height, args.canvas_width = picture.width;
    for (int c = 0; c < 3; c++)
        args.background[c] = (uint8_t)(120 - 7 * c), args.scale[c] = 0.0146f + 0.001f * c, args.shift[c] = -1.79f + 0.1f * c;
    return args;
}

static void some_picture(const char *name, int64_t largest) {
    Picture picture(draw(1, largest), draw(1, largest));
    const bool harsh = draw(0, 1); // black and white: sums leave the range of a byte
    for (uint8_t &byte : picture.bytes) byte = (uint8_t)(harsh ? 255 * draw(0, 1) : draw(0, 255));
    const int64_t step = draw(3, 4);
    Given given(picture, step, draw(0, 1) * 5, draw(0, 3) == 0);
    lk_prepare_image_args args = described(picture, given, step, name);
    if (draw(0, 1)) {
        args.canvas_height += draw(0, largest), args.canvas_width += draw(0, largest);
        args.top = draw(0, args.canvas_height - picture.height), args.left = draw(0, args.canvas_width - picture.width);
    }
    args.height_first = (int)draw(0, 1);
    args.new_height = draw(0, 4) ? draw(1, largest) : args.canvas_height;
    args.new_width = draw(0, 4) ? draw(1, largest) : args.canvas_width;
    args.size = draw(1, std::min(args.new_height, args.new_width));
    args.out_top = draw(0, args.new_height - args.size), args.out_left = draw(0, args.new_width - args.size);
    std::vector<float> out((size_t)(3 * args.size * args.size));
    args.out = out.data();
    CHECK(lk_prepare_image(&args) == LK_OK);
    CHECK(out == plain(args, picture));
}

static void defaults(const char *name) { // fields that are left out
    Picture picture(9, 14);
    for (uint8_t &byte : picture.bytes) byte = (uint8_t)draw(0, 255);
    Given given(picture, 3, 0, false);
    lk_prepare_image_args full = described(picture, given, 3, name);
    std::vector<float> out(3 * 25);
    full.new_height = 5, full.new_width = 7, full.size = 5, full.out_left = 1, full.out = out.data();
    lk_prepare_image_args args = full;
    args.row_stride = args.pixel_stride = args.canvas_height = args.canvas_width = 0;
    CHECK(lk_prepare_image(&args) == LK_OK);
    CHECK(out == plain(full, picture));
}

static void many_threads(const char *name) {
    Picture picture(61, 83);
    for (uint8_t &byte : picture.bytes) byte = (uint8_t)draw(0, 255);
    Given given(picture, 3, 0, false);
    lk_prepare_image_args args = described(picture, given, 3, name);
    args.new_height = args.new_width = args.size = 29;
    const std::vector<float> expected = plain(args, picture);
    std::vector<float> found[4];
    std::vector<std::thread> threads;
    for (std::vector<float> &own : found)
        threads.emplace_back([&own, args]() mutable {
            for (int i = 0; i < 20; i++) {
                own.assign(3 * 29 * 29, 0);
                args.out = own.data();
                if (lk_prepare_image(&args) != LK_OK) own.clear();
            }
        });
    for (std::thread &thread : threads) thread.join();
    for (std::vector<float> &own : found) CHECK(own == expected);
}

static void errors() {
    Picture picture(6, 8);
    Given given(picture, 3, 0, false);
    std::vector<float> out(3 * 16);
    lk_prepare_image_args good = described(picture, given, 3, nullptr);
    good.new_height = 4, good.new_width = 5, good.size = 4, good.out = out.data();
    CHECK(lk_prepare_image(&good) == LK_OK);
    CHECK(lk_prepare_image(nullptr) == LK_INVALID_ARGUMENT);
    lk_prepare_image_args args;
#define REJECTED(change, status) args = good, args.change; CHECK(lk_prepare_image(&args) == status)
    REJECTED(pixels = nullptr, LK_INVALID_ARGUMENT);
    REJECTED(out = nullptr, LK_INVALID_ARGUMENT);
    REJECTED(height = 0, LK_INVALID_ARGUMENT);
    REJECTED(width = -1, LK_INVALID_ARGUMENT);
    REJECTED(width = INT64_MAX, LK_INVALID_ARGUMENT);
    REJECTED(new_height = (1 << 24) + 1, LK_INVALID_ARGUMENT);
    REJECTED(pixel_stride = 2, LK_INVALID_ARGUMENT);
    REJECTED(row_stride = 23, LK_INVALID_ARGUMENT);
    REJECTED(row_stride = -23, LK_INVALID_ARGUMENT);
    REJECTED(row_stride = INT64_MIN, LK_INVALID_ARGUMENT);
    REJECTED(canvas_width = 7, LK_INVALID_ARGUMENT);
    REJECTED(top = 1, LK_INVALID_ARGUMENT);
    REJECTED(left = -1, LK_INVALID_ARGUMENT);
    REJECTED(left = INT64_MAX, LK_INVALID_ARGUMENT);
    REJECTED(out_left = 2, LK_INVALID_ARGUMENT);
    REJECTED(out_top = 1, LK_INVALID_ARGUMENT);
    REJECTED(size = 0, LK_INVALID_ARGUMENT);
    REJECTED(size = 5, LK_INVALID_ARGUMENT);
    REJECTED(instructions = "mmx", LK_UNSUPPORTED);
}

int main(int count, char **words) {
    const char *name = count > 1 ? words[1] : "portable";
    lk_handle *handle;
    CHECK(lk_create(&handle, LK_CPU) == LK_OK);
    const bool runs = lk_set_instructions(handle, name) == LK_OK;
    if (!runs) std::puts(lk_last_error(handle));
    lk_destroy(handle);
    if (!runs) return 77;
    for (int i = 0; i < 300; i++) some_picture(name, i % 3 ? 20 : 70);
    some_picture(name, 400);
    defaults(name);
    many_threads(name);
    errors();
    if (failures) std::printf("%d failures\n", failures);
    return failures != 0;
}
