// Weights of bfloat16 into 12 bits a value, and their memory.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <functional>
#include <numeric>
#include <vector>

#include "compact.h"
#include "handle.h"

namespace {

constexpr int64_t LIST_SHARE = 64; // one value in so many may stand in the list: more would cost more than is saved

struct Compact : lk_compact {
    Buffer<uint8_t> memory;
    std::vector<int64_t> firsts;
    std::vector<int32_t> places;
    std::vector<float> values;
};

float number(uint32_t half) { return std::bit_cast<float>(half << 16); }

const uint16_t *row_of(const lk_weight &weight, int64_t row) {
    return static_cast<const uint16_t *>(weight.data) + row * lk_or(weight.row_stride, weight.in_features);
}

// The 16 commonest upper bytes of some rows, that of the smallest numbers first.
std::array<uint8_t, 16> commonest(const lk_weight &weight) {
    constexpr int SETS = 4; // neighbours often are alike, and one counter would wait for itself
    constexpr int64_t SOME = 256;
    std::array<std::array<int64_t, SETS>, 256> counts{};
    for (int64_t n = 0; n < weight.out_features; n += lk::cdiv(weight.out_features, SOME))
        for (int64_t k = 0; k < weight.in_features; k++) counts[row_of(weight, n)[k] >> 8][k % SETS]++;
    std::array<uint8_t, 256> order;
    std::iota(order.begin(), order.end(), uint8_t{0});
    auto count = [&](uint8_t byte) { return std::reduce(counts[byte].begin(), counts[byte].end()); };
    std::ranges::stable_sort(order, std::greater{}, count);
    std::array<uint8_t, 16> upper;
    std::copy_n(order.begin(), 16, upper.begin());
    std::ranges::sort(upper, std::less{}, [](uint8_t byte) { return byte & 127; });
    return upper;
}

// Where the bytes of a block's values i, i + 1, ..., i + 7 lie among its lower bytes: see compact.h.
constexpr int64_t place_of(int64_t i) {
    constexpr int64_t PLACES[] = {0, 2, 1, 3};
    return i / 32 * 32 + 8 * PLACES[i / 8 % 4];
}

using Index = int8_t[256]; // which of the 16 an upper byte is, or -1

// Values of a row into its blocks; returns how many have another upper byte, in whose place a value of upper byte 0 stands.
int64_t put_row(const uint16_t *row, int64_t width, const Index &index, uint8_t *to) {
    constexpr int64_t BLOCK = lk_compact::BLOCK, RUN = 8;
    int64_t others = 0;
    for (int64_t from = 0; from < width; from += BLOCK, to += lk_compact::BYTES) {
        const int64_t count = std::min(BLOCK, width - from);
        uint16_t values[BLOCK] = {};
        std::copy_n(row + from, count, values);
        uint8_t lower[BLOCK];
        int8_t upper[BLOCK], all = 0;
        for (int64_t i = 0; i < BLOCK; i++) lower[i] = (uint8_t)values[i], upper[i] = index[values[i] >> 8], all |= upper[i];
        for (int64_t i = 0; all < 0 && i < BLOCK; i++)
            if (upper[i] < 0) lower[i] = 0, upper[i] = 0, others += i < count;
        std::memset(to + BLOCK, 0, BLOCK / 2);
        for (int64_t i = 0; i < BLOCK; i += RUN) {
            const int64_t at = place_of(i);
            std::memcpy(to + at, lower + i, RUN);
            uint64_t indices, both;
            std::memcpy(&indices, upper + i, RUN), std::memcpy(&both, to + BLOCK + at % (BLOCK / 2), RUN);
            both |= at < BLOCK / 2 ? indices : indices << 4;
            std::memcpy(to + BLOCK + at % (BLOCK / 2), &both, RUN);
        }
    }
    return others;
}

// The values of a row that have another upper byte. in_place: what stands in their place.
void list_row(const uint16_t *row, int64_t width, const Index &index, float in_place, int32_t *at, float *missing) {
    for (int64_t k = 0; k < width; k++)
        if (index[row[k] >> 8] < 0) *at++ = (int32_t)k, *missing++ = number(row[k]) - in_place;
}

} // namespace

using namespace lk;

extern "C" {

lk_status lk_compact_create(lk_handle *handle, const lk_weight *weight, lk_compact **compact) {
    if (compact) *compact = nullptr;
    if (lk_status status = cpu_only(handle)) return status;
    CHECK_POINTERS(handle, {"weight", weight}, {"compact", compact});
    if (lk_status status = check_weight(handle, "weight", *weight)) return status;
    if (weight->format != LK_WEIGHT_BFLOAT16)
        return lk_fail(handle, LK_UNSUPPORTED, "a weight of format %d has no compact form: it must be bfloat16",
                       (int)weight->format);
    lk_cpu &cpu = *handle->cpu;
    if (!cpu.isa->compact_rows)
        return lk_fail(handle, LK_UNSUPPORTED, "instructions \"%s\" do not read compact weights", cpu.isa->name);
    return guarded(handle, [&] {
        auto made = std::make_unique<Compact>();
        const int64_t rows = weight->out_features, width = weight->in_features;
        made->out_features = rows, made->in_features = width;
        made->row_bytes = cdiv(width, lk_compact::BLOCK) * lk_compact::BYTES;
        std::ranges::copy(commonest(*weight), made->upper);
        Index index;
        std::fill_n(index, 256, int8_t{-1});
        for (int i = 0; i < 16; i++) index[made->upper[i]] = (int8_t)i;
        uint8_t *data = made->memory.at_least(rows * made->row_bytes);
        made->firsts.assign(rows + 1, 0); // for now how many the row before has
        share_rows(cpu, rows, width, [&](int64_t first, int64_t last, int64_t) {
            for (int64_t n = first; n < last; n++)
                made->firsts[n + 1] = put_row(row_of(*weight, n), width, index, data + n * made->row_bytes);
        });
        std::partial_sum(made->firsts.begin(), made->firsts.end(), made->firsts.begin());
        const int64_t listed = made->firsts[rows];
        if (listed > rows * width / LIST_SHARE + 16) // the smallest have few of anything
            return lk_fail(handle, LK_UNSUPPORTED, "%lld of %lld weights have none of the 16 commonest upper bytes: more than "
                           "one in %lld", (long long)listed, (long long)(rows * width), (long long)LIST_SHARE);
        made->places.resize(listed), made->values.resize(listed);
        share_rows(cpu, rows, width, [&](int64_t first, int64_t last, int64_t) {
            for (int64_t n = first; n < last; n++)
                if (const int64_t at = made->firsts[n]; at < made->firsts[n + 1])
                    list_row(row_of(*weight, n), width, index, number(made->upper[0] << 8), &made->places[at], &made->values[at]);
        });
        use_large_pages(data, rows * made->row_bytes);
        made->data = data, made->first = made->firsts.data(), made->at = made->places.data(), made->missing = made->values.data();
        *compact = made.release();
        return LK_OK;
    });
}

void lk_compact_destroy(lk_compact *compact) { delete static_cast<Compact *>(compact); }

int64_t lk_compact_bytes(const lk_compact *compact) {
    if (!compact) return 0;
    const auto *own = static_cast<const Compact *>(compact);
    return own->out_features * own->row_bytes + (int64_t)(8 * own->firsts.size() + 8 * own->places.size());
}

} // extern "C"
