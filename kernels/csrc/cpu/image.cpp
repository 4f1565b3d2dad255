// A picture resized to the vision tower's input: two passes over bytes, each of which computes only what is looked at.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <memory>
#include <vector>

#include "isa.h"

using namespace lk;

namespace {

constexpr int64_t LARGEST = 1 << 24, LONGEST_ROW = INT32_MAX; // bytes

double bicubic(double x) { // of Keys, a = -0.5
    x = std::fabs(x);
    const double near = (1.5 * x - 2.5) * x * x + 1, far = (((x - 5) * x + 8) * x - 4) * -0.5;
    return x < 1 ? near : x < 2 ? far : 0;
}

// How `wanted` places from `start` on, of `to` in all, are made of `from` places. Each step is Pillow's, in its order.
struct Axis {
    Axis(int64_t from, int64_t to, int64_t start, int64_t wanted) {
        const double scale = (double)from / (double)to, stretch = std::max(scale, 1.0), reach = 2 * stretch;
        const int64_t most = (int64_t)std::ceil(reach) * 2 + 1;
        const double narrow = 1 / stretch;
        weights.resize((size_t)(most * wanted));
        std::vector<double> exact((size_t)most);
        int32_t *weight = weights.data();
        for (int64_t i = start; i < start + wanted; i++) {
            const double centre = ((double)i + 0.5) * scale;
            const int64_t first = std::max<int64_t>(0, (int64_t)(centre - reach + 0.5));
            const int64_t count = std::min(from, (int64_t)(centre + reach + 0.5)) - first;
            double total = 0;
            for (int64_t j = 0; j < count; j++) exact[j] = bicubic(((double)(j + first) - centre + 0.5) * narrow);
            for (int64_t j = 0; j < count; j++) total += exact[j];
            for (int64_t j = 0; j < count; j++) {
                const double part = exact[j] / total * (1 << 22);
                weight[j] = (int32_t)(part + (part < 0 ? -0.5 : 0.5));
            }
            taps.push_back({first, count, weight});
            weight += count;
        }
        low = taps.front().first, high = taps.back().first + taps.back().count;
    }
    std::vector<Taps> taps;
    std::vector<int32_t> weights;
    int64_t low, high; // all that is looked at
};

struct Bytes : std::unique_ptr<uint8_t[]> {
    explicit Bytes(int64_t count) : unique_ptr(new uint8_t[(size_t)count]) {} // not cleared
};

// Of a canvas's places low..high-1, those where the picture lies.
struct Span {
    Span(const Axis &axis, int64_t at, int64_t size)
        : first(std::clamp(at, axis.low, axis.high)), last(std::clamp(at + size, axis.low, axis.high)),
          whole(first == axis.low && last == axis.high) {}
    int64_t first, last;
    bool whole; // and it lies on all of them
};

// One picture and the memory of both passes. In width, rows go through in blocks of PICTURE_ROWS; what of the canvas the
// picture does not cover is background in `turned` beside it, and the one row `empty` above and below it.
class Resize {
  public:
    Resize(const Isa &isa, const lk_prepare_image_args &args)
        : isa(isa), args(args), pixel(args.pixel_stride),
          x(args.canvas_width, args.new_width, args.out_left, args.size),
          y(args.canvas_height, args.new_height, args.out_top, args.size), wide(x, args.left, args.width),
          high(y, args.top, args.height), bytes((wide.last - wide.first) * pixel),
          turned((x.high - x.low) * pixel * PICTURE_ROWS), plane((args.size + 15) / 16 * 16),
          made(3 * plane * PICTURE_ROWS), empty(bytes) {
        for (Taps &taps : x.taps) taps.first -= x.low;
        fill(turned.get(), wide.first - x.low, PICTURE_ROWS);
        fill(turned.get() + (wide.last - x.low) * pixel * PICTURE_ROWS, x.high - wide.last, PICTURE_ROWS);
        if (!high.whole) fill(empty.get(), wide.last - wide.first, 1);
        std::memset(made.get(), 0, (size_t)(3 * plane * PICTURE_ROWS));
        across = {pixel, (wide.first - x.low) * pixel, bytes, turned.get(), x.taps.data(), args.size, plane, made.get()};
    }

    void width_first() {
        const int64_t inside = high.last - high.first, rows = inside + !high.whole; // the last one is background
        const int64_t width = 3 * plane;
        Bytes between((rows + PICTURE_ROWS - 1) / PICTURE_ROWS * PICTURE_ROWS * width), row(width);
        for (int64_t i = 0; i < rows; i += PICTURE_ROWS) {
            const uint8_t *from[PICTURE_ROWS];
            for (int64_t j = 0; j < PICTURE_ROWS; j++) from[j] = canvas_row(high.first + std::min(i + j, rows - 1));
            isa.across(across, from, between.get() + i * width);
        }
        std::vector<const uint8_t *> from;
        for (int64_t i = 0; i < args.size; i++) {
            const Taps &taps = y.taps[(size_t)i];
            from.clear();
            for (int64_t j = taps.first; j < taps.first + taps.count; j++)
                from.push_back(between.get() + (j < high.first || j >= high.last ? inside : j - high.first) * width);
            isa.down(taps, from.data(), width, row.get());
            normalise(i, row.get());
        }
    }

    void height_first() {
        Bytes between(args.size * bytes), rows(PICTURE_ROWS * 3 * plane);
        std::vector<const uint8_t *> from;
        for (int64_t i = 0; i < args.size; i++) {
            const Taps &taps = y.taps[(size_t)i];
            from.clear();
            for (int64_t j = taps.first; j < taps.first + taps.count; j++) from.push_back(canvas_row(j));
            isa.down(taps, from.data(), bytes, between.get() + i * bytes);
        }
        for (int64_t i = 0; i < args.size; i += PICTURE_ROWS) {
            const int64_t count = std::min(PICTURE_ROWS, args.size - i);
            from.clear();
            for (int64_t j = 0; j < PICTURE_ROWS; j++) from.push_back(between.get() + (i + std::min(j, count - 1)) * bytes);
            isa.across(across, from.data(), rows.get());
            for (int64_t j = 0; j < count; j++) normalise(i + j, rows.get() + j * 3 * plane);
        }
    }

  private:
    // Pixels of the background, each byte `times`.
    void fill(uint8_t *to, int64_t pixels, int64_t times) {
        for (int64_t i = 0; i < pixels * pixel; i++, to += times)
            std::memset(to, i % pixel < 3 ? args.background[i % pixel] : 0, (size_t)times);
    }

    // The picture's part of a row of the canvas.
    const uint8_t *canvas_row(int64_t row) const {
        if (row < high.first || row >= high.last) return empty.get();
        return args.pixels + (row - args.top) * args.row_stride + (wide.first - args.left) * pixel;
    }

    void normalise(int64_t row, const uint8_t *from) {
        for (int64_t c = 0; c < 3; c++)
            isa.normalise(from + c * plane, args.size, args.scale[c], args.shift[c],
                          args.out + (c * args.size + row) * args.size);
    }

    const Isa &isa;
    const lk_prepare_image_args &args;
    int64_t pixel;
    Axis x, y;
    Span wide, high;
    int64_t bytes; // of a row of the picture, as far as it is looked at
    Bytes turned;
    int64_t plane;
    Bytes made, empty;
    Across across;
};

bool inside(int64_t at, int64_t size, int64_t whole) { return at >= 0 && size <= whole && at <= whole - size; }

// Puts in what was left out, if what there is can be.
bool complete(lk_prepare_image_args &args) {
    auto or_else = [](int64_t &value, int64_t other) { value = value ? value : other; };
    or_else(args.canvas_height, args.height), or_else(args.canvas_width, args.width), or_else(args.pixel_stride, 3);
    for (int64_t size : {args.height, args.width, args.canvas_height, args.canvas_width, args.new_height, args.new_width,
                         args.size})
        if (size < 1 || size > LARGEST) return false;
    if (!args.pixels || !args.out || args.pixel_stride < 3 || args.pixel_stride > 4) return false;
    const int64_t row = args.width * args.pixel_stride;
    or_else(args.row_stride, row);
    const int64_t stride = std::abs(std::max<int64_t>(args.row_stride, -LONGEST_ROW - 1)); // INT64_MIN has no opposite
    return stride >= row && stride <= LONGEST_ROW && inside(args.top, args.height, args.canvas_height) &&
           inside(args.left, args.width, args.canvas_width) && inside(args.out_top, args.size, args.new_height) &&
           inside(args.out_left, args.size, args.new_width);
}

} // namespace

extern "C" lk_status lk_prepare_image(const lk_prepare_image_args *given) {
    static const Isa *const best = find_isa(nullptr);
    if (!given) return LK_INVALID_ARGUMENT;
    lk_prepare_image_args args = *given;
    if (!complete(args)) return LK_INVALID_ARGUMENT;
    const Isa *isa = args.instructions ? find_isa(args.instructions) : best;
    if (!isa) return LK_UNSUPPORTED;
    try {
        Resize resize(*isa, args);
        args.height_first ? resize.height_first() : resize.width_first();
    } catch (const std::exception &) {
        return LK_OUT_OF_MEMORY;
    }
    return LK_OK;
}
