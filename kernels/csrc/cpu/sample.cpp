// lk_sample: rows shared out among threads.
#include "handle.h"

using namespace lk;

extern "C" lk_status lk_sample(lk_handle *handle, const lk_sample_args *args) {
    if (lk_status status = cpu_only(handle)) return status;
    if (lk_status status = lk_check_call(handle, args, LK_FLOAT32)) return status;
    CHECK_SIZES(handle, {"rows", args->rows, 0}, {"vocabulary", args->vocabulary, 1});
    if (args->rows == 0) return LK_OK;
    CHECK_POINTERS(handle, {"logits", args->logits}, {"seeds", args->seeds}, {"positions", args->positions}, {"ids", args->ids});
    if (!args->counts && (args->repetition_penalty || args->presence_penalty || args->frequency_penalty))
        return lk_fail(handle, LK_INVALID_ARGUMENT, "penalties need counts, which is NULL");
    return guarded(handle, [&] {
        lk_cpu &cpu = *handle->cpu;
        const int64_t vocabulary = args->vocabulary, stride = lk_or(args->logits_stride, vocabulary);
        const int64_t room = cdiv(vocabulary, 16) * 16; // whole vectors of any width
        float *scratch = cpu.scratch.at_least(room * cpu.pool->threads());
        auto of = [](const auto *values, int64_t row, auto off) { return values ? values[row] : off; };
        cpu.pool->each(args->rows, [&](int64_t row, int thread) {
            const float repetition = of(args->repetition_penalty, row, 1.f), presence = of(args->presence_penalty, row, 0.f);
            const float frequency = of(args->frequency_penalty, row, 0.f);
            const bool counted = args->counts && (repetition != 1 || presence != 0 || frequency != 0);
            const int64_t at = args->table_rows ? args->table_rows[row] : row;
            args->ids[row] = cpu.isa->draw(
                {.vocabulary = vocabulary, .logits = args->logits + row * stride,
                 .counts = counted ? args->counts + at * lk_or(args->counts_stride, vocabulary) : nullptr,
                 .in_prompt = args->in_prompt ? args->in_prompt + at * lk_or(args->in_prompt_stride, vocabulary) : nullptr,
                 .repetition = repetition, .presence = presence, .frequency = frequency,
                 .temperature = of(args->temperature, row, 1.f), .top_p = of(args->top_p, row, 1.f), .min_p = of(args->min_p, row, 0.f), .top_k = of(args->top_k, row, 0),
                 .seed = args->seeds[row], .position = args->positions[row], .scratch = scratch + thread * room,
                 .logprob = args->logprobs ? args->logprobs + row : nullptr});
        });
        return LK_OK;
    });
}
