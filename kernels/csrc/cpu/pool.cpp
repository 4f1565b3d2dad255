#include "pool.h"

#include <chrono>

#include <unistd.h>

namespace lk {

namespace {

// How long a thread looks out before it sleeps, and a helper whose last calls came one upon another: waking it takes as
// long as a small step. The longer it looks, the rather it gives way to others that want its core.
using Clock = std::chrono::steady_clock;
constexpr Clock::duration WATCH = std::chrono::microseconds(60), LONG_WATCH = std::chrono::microseconds(500);

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Whether `happened` became true in so long.
template <class F>
bool watch(F happened, Clock::duration time) {
    const auto begin = Clock::now();
    for (auto now = begin; now < begin + time; now = Clock::now()) {
        for (int i = 0; i < 32; i++) {
            if (happened()) return true;
            pause();
        }
        if (now > begin + WATCH) std::this_thread::yield();
    }
    return happened();
}

} // namespace

Pool::Pool(int threads) : owner(getpid()) {
    for (int i = 1; i < threads; i++) helpers.emplace_back([this, i] { help(i); });
}

Pool::~Pool() {
    if (getpid() != owner) { // a child of fork has no helpers: there is nobody to wait for
        for (auto &helper : helpers) helper.detach();
        return;
    }
    closing.store(true);
    calls.fetch_add(1);
    calls.notify_all();
    for (auto &helper : helpers) helper.join();
}

void Pool::run(int64_t count, Task work, void *with) {
    if (helpers.empty() || count <= 1) {
        for (int64_t i = 0; i < count; i++) work(with, i, 0);
        return;
    }
    // Nobody looks at these while no task is to be taken.
    task.store(work, std::memory_order_relaxed);
    context.store(with, std::memory_order_relaxed);
    left.store((uint32_t)count, std::memory_order_relaxed);
    const uint64_t job = (ticket.load(std::memory_order_relaxed) >> 32) + 1;
    ticket.store(job << 32 | (uint64_t)count, std::memory_order_release);
    calls.fetch_add(1); // sequentially consistent with `asleep`: a helper that misses the call is seen to sleep
    if (asleep.load()) calls.notify_all();

    for (uint64_t seen = ticket.load(); (uint32_t)seen; seen = ticket.load()) take(seen, 0);
    auto done = [this] { return left.load(std::memory_order_acquire) == 0; };
    if (watch(done, WATCH)) return;
    for (uint32_t some; (some = left.load(std::memory_order_acquire));) left.wait(some, std::memory_order_acquire);
}

// Takes and does one task of the job in `seen`; false if it was gone.
bool Pool::take(uint64_t seen, int thread) {
    Task work = task.load(std::memory_order_relaxed);
    void *with = context.load(std::memory_order_relaxed);
    if (!ticket.compare_exchange_strong(seen, seen - 1, std::memory_order_acq_rel)) return false;
    work(with, (int64_t)(uint32_t)seen - 1, thread);
    if (left.fetch_sub(1, std::memory_order_acq_rel) == 1) left.notify_all();
    return true;
}

void Pool::help(int thread) {
    Clock::duration patience = WATCH;
    while (true) {
        const uint32_t call = calls.load();
        for (uint64_t seen = ticket.load(std::memory_order_acquire); (uint32_t)seen; seen = ticket.load(std::memory_order_acquire))
            take(seen, thread);
        if (closing.load()) return;
        auto called = [this, call] { return calls.load(std::memory_order_relaxed) != call; };
        const auto begin = Clock::now();
        if (watch(called, patience)) continue; // jobs, and short calls, follow one another closely
        asleep.fetch_add(1);
        calls.wait(call); // returns at once where the call has come meanwhile
        asleep.fetch_sub(1);
        patience = Clock::now() - begin < LONG_WATCH ? LONG_WATCH : WATCH;
    }
}

} // namespace lk
