// Where weights lie in memory.
#include <cerrno>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "handle.h"

void lk::use_large_pages(const void *memory, int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t PAGE = 2 << 20;
    constexpr int COLLAPSE = 25; // MADV_COLLAPSE, which older headers lack
    const uintptr_t first = (uintptr_t)memory / PAGE * PAGE, end = (uintptr_t)memory + (uintptr_t)bytes;
    for (uintptr_t page = first; bytes >= (int64_t)PAGE / 2 && page < end; page += PAGE)
        if (madvise((void *)page, PAGE, COLLAPSE) && errno == EINVAL && page != first) return; // unknown here, or a file's
#else
    (void)memory, (void)bytes;
#endif
}
