#include "pool.h"

#include <chrono>

#include <unistd.h>
#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

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

// Off the core that this thread runs on, if it waits for that one and may use others.
void push_away([[maybe_unused]] std::thread &thread) {
#if defined(__linux__)
    cpu_set_t all, others;
    const int here = sched_getcpu();
    if (here < 0 || here >= CPU_SETSIZE || pthread_getaffinity_np(thread.native_handle(), sizeof all, &all)) return;
    others = all;
    CPU_CLR(here, &others);
    if (CPU_COUNT(&others) == 0 || pthread_setaffinity_np(thread.native_handle(), sizeof others, &others)) return;
    pthread_setaffinity_np(thread.native_handle(), sizeof all, &all);
#endif
}

} // namespace

Pool::Pool(int threads) : owner(getpid()), helpers((size_t)(threads - 1)) {
    try {
        for (int i = 1; i < threads; i++) helpers[(size_t)i - 1].thread = std::thread([this, i] { help(i); });
    } catch (...) { // the system gives no more
        close();
        throw;
    }
}

Pool::~Pool() { close(); }

void Pool::close() {
    const bool own = getpid() == owner; // a child of fork has no helpers: there is nobody to wait for
    if (own) {
        closing.store(true);
        calls.fetch_add(1);
        calls.notify_all();
    }
    for (Helper &helper : helpers) {
        if (!helper.thread.joinable()) return; // nor is any after it
        own ? helper.thread.join() : helper.thread.detach();
    }
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
    if (asleep.load()) wake();

    for (uint64_t seen = ticket.load(); (uint32_t)seen; seen = ticket.load()) take(seen, 0);
    auto done = [this] { return left.load(std::memory_order_acquire) == 0; };
    if (watch(done, WATCH)) return;
    for (uint32_t some; (some = left.load(std::memory_order_acquire));) left.wait(some, std::memory_order_acquire);
}

// Linux may put a helper that is called onto its caller's own core, beside one that idles. There it runs when the caller
// rests, which is soon only if the system balances the two: 10 ms were seen, as long as 50 products of a small decoder. So
// one that has not come by the next job is pushed away.
void Pool::wake() {
    calls.notify_all();
    for (Helper &helper : helpers) {
        const uint32_t nap = helper.naps.load(std::memory_order_relaxed);
        if (nap % 2 == 0) continue;
        if (nap != helper.called_in)
            helper.called_in = nap, helper.pushed = false;
        else if (!helper.pushed)
            helper.pushed = true, push_away(helper.thread);
    }
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
    std::atomic<uint32_t> &naps = helpers[(size_t)thread - 1].naps;
    while (true) {
        const uint32_t call = calls.load();
        for (uint64_t seen = ticket.load(std::memory_order_acquire); (uint32_t)seen; seen = ticket.load(std::memory_order_acquire))
            take(seen, thread);
        if (closing.load()) return;
        auto called = [this, call] { return calls.load(std::memory_order_relaxed) != call; };
        const auto begin = Clock::now();
        if (watch(called, patience)) continue; // jobs, and short calls, follow one another closely
        naps.fetch_add(1, std::memory_order_relaxed);
        asleep.fetch_add(1);
        calls.wait(call); // returns at once where the call has come meanwhile
        asleep.fetch_sub(1);
        naps.fetch_add(1, std::memory_order_relaxed);
        patience = Clock::now() - begin < LONG_WATCH ? LONG_WATCH : WATCH;
    }
}

} // namespace lk
