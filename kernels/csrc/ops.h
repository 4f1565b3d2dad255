/* What the operations' files share: checks of arguments, and shorthands for a kernel's values. */
#ifndef LK_OPS_H
#define LK_OPS_H

#include "library.h"

struct lk_size {
    const char *name;
    int64_t value, least;
};

struct lk_pointer {
    const char *name;
    const void *value;
};

/* What is looked at first in every call. */
lk_status lk_check_call(lk_handle *handle, const void *args, lk_dtype dtype);
/* LK_INVALID_ARGUMENT with the name of the first size that is too small or beyond 32 bits. */
lk_status lk_check_sizes(lk_handle *handle, const struct lk_size *sizes, int count);
/* LK_INVALID_ARGUMENT with the name of the first that is NULL. */
lk_status lk_check_pointers(lk_handle *handle, const struct lk_pointer *pointers, int count);

#define CHECK_SIZES(handle, ...)                                                                                   \
    do {                                                                                                           \
        const struct lk_size sizes_[] = {__VA_ARGS__};                                                             \
        lk_status status_ = lk_check_sizes(handle, sizes_, (int)(sizeof sizes_ / sizeof sizes_[0]));               \
        if (status_) return status_;                                                                               \
    } while (0)

#define CHECK_POINTERS(handle, ...)                                                                                \
    do {                                                                                                           \
        const struct lk_pointer pointers_[] = {__VA_ARGS__};                                                       \
        lk_status status_ = lk_check_pointers(handle, pointers_, (int)(sizeof pointers_ / sizeof pointers_[0]));   \
        if (status_) return status_;                                                                               \
    } while (0)

/* Triton's name of a pointer to such numbers: "*bf16". NULL: there is no such dtype. */
const char *lk_pointer_type(lk_dtype dtype);

static inline int64_t lk_or(int64_t stride, int64_t contiguous) { return stride ? stride : contiguous; }
static inline int64_t lk_next_power_of_2(int64_t n) {
    int64_t power = 1;
    while (power < n) power *= 2;
    return power;
}
static inline int64_t lk_cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

#endif
