/* What the C files call where a handle belongs to the CPU. Arguments have been checked as far as they do for GPUs. */
#ifndef LK_CPU_H
#define LK_CPU_H

#include "llava_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

struct lk_cpu; /* instruction set and threads of a handle */

lk_status lk_cpu_open(lk_handle *handle);
void lk_cpu_close(struct lk_cpu *cpu);

lk_status lk_cpu_rms_norm(lk_handle *handle, const lk_rms_norm_args *args);
lk_status lk_cpu_rope(lk_handle *handle, const lk_rope_args *args);
lk_status lk_cpu_swiglu(lk_handle *handle, const lk_swiglu_args *args);
lk_status lk_cpu_store_kv(lk_handle *handle, const lk_store_kv_args *args);
lk_status lk_cpu_paged_attention(lk_handle *handle, const lk_paged_attention_args *args);
/* patches and strides as lk_project_splice has worked them out. */
lk_status lk_cpu_project_splice(lk_handle *handle, const lk_project_splice_args *args, int64_t patches,
                                int64_t image_stride, int64_t patch_stride);

#ifdef __cplusplus
}
#endif

#endif
