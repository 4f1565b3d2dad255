// What the files that are compiled for several instruction sets call of one another: in a namespace of the set's name, so
// that no function built for one processor is linked into another's code. LK_LIKE is the set whose files these are: LK_ISA
// itself, or one that it has all instructions of.
#pragma once

#include "isa.h"

#define LK_JOIN_(a, b) a##b
#define LK_JOIN(a, b) LK_JOIN_(a, b)
#define LK_INNER LK_JOIN(on_, LK_LIKE)

namespace lk::LK_INNER {

void rms_norm(const RmsNorm &task, int64_t first, int64_t last);
void rms_norm_backward(const RmsNormBackward &task, int64_t first, int64_t last, float *d_weight);
void rope(const Rope &task, int64_t first, int64_t last);
void swiglu_rows(const Swiglu &task, int64_t first, int64_t last);
void swiglu_rows_backward(const Swiglu &task, int64_t first, int64_t last);
void varlen_attention(const VarlenAttention &task, float *scratch);
void varlen_attention_backward(const VarlenAttention &task, float *scratch);
void across(const Across &task, const uint8_t *const *rows, uint8_t *out);
void down(const Taps &taps, const uint8_t *const *rows, int64_t bytes, uint8_t *out);
void normalise(const uint8_t *from, int64_t count, float scale, float shift, float *out);

} // namespace lk::LK_INNER
