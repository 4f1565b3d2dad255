// A CPU handle's threads, instruction set and memory for intermediate results.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

extern "C" {
#include "../ops.h"
}
#include "cpu.h"
#include "isa.h"
#include "pool.h"

// Memory that grows and is never cleared, aligned for the widest vectors.
template <class T>
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer &) = delete;
    ~Buffer() { ::operator delete(memory, std::align_val_t(64)); }
    T *at_least(int64_t count) {
        if (count > size) {
            ::operator delete(memory, std::align_val_t(64));
            memory = nullptr, size = 0;
            memory = static_cast<T *>(::operator new(sizeof(T) * (size_t)count, std::align_val_t(64)));
            size = count;
        }
        return memory;
    }

  private:
    T *memory = nullptr;
    int64_t size = 0;
};

// Memory of a panel.
struct PanelBuffer {
    // For `rows` activations that meet `weight`, and may be rounded as the source says.
    const lk::Panel &fit(const lk::Isa &isa, const lk_weight &weight, int64_t rows, const lk::Source &source);
    lk::Panel panel{};

  private:
    Buffer<float> values, scale, total;
    Buffer<int16_t> codes;
};

struct lk_cpu {
    const lk::Isa *isa;
    std::unique_ptr<lk::Pool> pool;
    PanelBuffer panel;
    Buffer<float> scratch; // a part for each thread
    Buffer<float> partials; // of attention, where a sequence's keys are shared out
    struct {
        Buffer<float> stream, pixels, projected, attended, inner, lse, vectors;
    } vision;
};

namespace lk {

constexpr int64_t FEW_ROWS = 4; // activations that one thread prepares sooner than it could share them out

inline int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t size_of(lk_dtype dtype) { return dtype == LK_FLOAT32 ? 4 : 2; }

// Nothing that C++ throws may reach C.
template <class F>
lk_status guarded(lk_handle *handle, F &&body) {
    try {
        return body();
    } catch (const std::exception &error) {
        return lk_fail(handle, LK_OUT_OF_MEMORY, "%s", error.what());
    }
}

inline lk_status cpu_only(lk_handle *handle) {
    if (!handle) return LK_INVALID_ARGUMENT;
    if (!handle->cpu) return lk_fail(handle, LK_UNSUPPORTED, "only a handle of LK_CPU can do this");
    return LK_OK;
}

// LK_INVALID_ARGUMENT or LK_UNSUPPORTED with the name of the weight where something about it cannot be.
lk_status check_weight(lk_handle *handle, const char *name, const lk_weight &weight);
lk_status check_dtype(lk_handle *handle, const char *op, lk_dtype dtype);
lk_status check_activation_bits(lk_handle *handle, int bits);

// Puts memory into pages of 2 MiB where Linux can (6.1 and later): weights are read from end to end at every token, and
// under a hypervisor a quarter of that time goes into finding small pages. The edges take in what lies beside them, which
// notices nothing. Where it cannot be done all stays as it was.
void use_large_pages(const void *memory, int64_t bytes);

// The panel of `rows` activations for `weight`, prepared on all threads.
const Panel &prepare(lk_cpu &cpu, PanelBuffer &buffer, const lk_weight &weight, const Source &source, int64_t rows);

// Features that parts of a product have a multiple of: whole squares, or what the other kernels take at a time.
inline int64_t unit_of(const Panel &panel, int64_t unit) { return panel.in_squares() ? 32 : unit; }

// Where the next of a product's parts begins: large ones first, so that rows of a weight are read in long runs, small ones at
// the end, so that no thread waits long for the last. One row takes as long as its weight takes to come out of memory, which
// each beginning of a part holds up: every thread gets nine tenths of its share at once, and then the rest.
inline int64_t next_part(int64_t first, int64_t features, int64_t rows, int64_t threads, int64_t unit) {
    if (threads == 1) return features;
    const int64_t even = cdiv(9 * features, 10 * threads * unit) * unit;
    const int64_t share = rows > 1 ? std::max(cdiv(3 * (features - first), 4 * threads), cdiv(features, 16 * threads))
                          : first < threads * even ? even
                                                   : cdiv(features - threads * even, threads);
    return std::min(first + cdiv(share, unit) * unit, features);
}

// Calls body(first_row, rows, first, count, thread) for parts of a (rows, features) product that together cover it.
// Parts have a multiple of `unit` features, but for the last, and at most ROW_BLOCK rows. Those of the same features follow
// one another on one thread, so that the weight stays near, but where there are too few features for all threads.
template <class F>
void share_product(lk_cpu &cpu, int64_t rows, int64_t features, int64_t unit, F &&body) {
    const int64_t threads = cpu.pool->threads(), blocks = cdiv(rows, ROW_BLOCK), wanted = cdiv(8 * threads * unit, features);
    const int64_t shares = threads == 1 ? 1 : std::min(wanted, blocks); // of the rows
    int64_t parts = 0;
    for (int64_t first = 0; first < features; parts++) first = next_part(first, features, rows, threads, unit);
    cpu.pool->each(parts * shares, [&](int64_t task, int thread) { // the pool begins with the last task
        int64_t first = 0;
        for (int64_t i = parts - 1; i > task / shares; i--) first = next_part(first, features, rows, threads, unit);
        const int64_t count = next_part(first, features, rows, threads, unit) - first, share = task % shares;
        const int64_t end = std::min((share + 1) * blocks / shares * ROW_BLOCK, rows);
        for (int64_t row = share * blocks / shares * ROW_BLOCK; row < end; row += ROW_BLOCK)
            body(row, std::min(ROW_BLOCK, end - row), first, count, thread);
    });
}

// Calls body(first, last, part) for runs of rows of `width` values, which do not depend on how many threads there are.
constexpr int64_t PART_VALUES = 1 << 15;
template <class F>
void share_rows(lk_cpu &cpu, int64_t rows, int64_t width, F &&body) {
    const int64_t part = width < PART_VALUES ? PART_VALUES / width : 1, parts = cdiv(rows, part);
    if (parts == 1) return body(int64_t{0}, rows, int64_t{0});
    cpu.pool->each(parts, [&](int64_t i, int) { body(i * part, (i + 1) * part < rows ? (i + 1) * part : rows, i); });
}

// Attention of every sequence of a step; q and out are (tokens, heads * head_dim) floats.
struct PagedStep {
    int64_t sequences, heads, kv_heads, head_dim, block_size;
    lk_dtype cache_dtype;
    int64_t block_stride, token_stride, head_stride;
    const int32_t *block_table, *context_lens, *query_start;
    int64_t table_stride;
};
void attend(lk_cpu &cpu, const PagedStep &step, const void *k_cache, const void *v_cache, const float *q,
            int64_t q_stride, float *out);
// LK_INVALID_ARGUMENT where a length or a block number cannot be. `blocks`: of the cache, or 0 where it is not known.
lk_status check_step(lk_handle *handle, const PagedStep &step, int64_t tokens, int64_t blocks);

} // namespace lk
