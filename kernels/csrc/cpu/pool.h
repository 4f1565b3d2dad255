// A few threads that share out the tasks of one job after another, and sleep soon when there is none.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace lk {

// The thread that asks works too, and takes whatever task nobody else has taken: a helper that the system has put aside
// holds up nothing unless it has begun a task. So processes that share cores slow each other down by their share alone.
class Pool {
  public:
    using Task = void (*)(void *context, int64_t task, int thread);

    explicit Pool(int threads);
    ~Pool();
    int threads() const { return (int)helpers.size() + 1; }

    // task(context, i, thread) for every i < count, on whichever thread; returns when all are done.
    void run(int64_t count, Task task, void *context);
    template <class F>
    void each(int64_t count, F &&f) {
        run(count, [](void *context, int64_t i, int thread) { (*static_cast<F *>(context))(i, thread); }, &f);
    }

  private:
    struct Helper {
        std::thread thread;
        std::atomic<uint32_t> naps{0}; // one more when it falls asleep and when it wakes: odd while it sleeps
        uint32_t called_in = 0;        // the nap in which it was last called
        bool pushed = false;           // in that nap
    };
    void close();
    void help(int thread);
    bool take(uint64_t seen, int thread);
    void wake();

    const int owner; // the process that has the helpers
    std::vector<Helper> helpers;
    // The job's number in the upper half, how many tasks nobody has taken in the lower. Taking one is a single exchange,
    // which fails if the job has changed since.
    alignas(64) std::atomic<uint64_t> ticket{0};
    std::atomic<Task> task{nullptr};
    std::atomic<void *> context{nullptr};
    alignas(64) std::atomic<uint32_t> left{0}; // tasks that are not done
    alignas(64) std::atomic<uint32_t> calls{0}; // changes when there is a job; helpers sleep on it
    std::atomic<uint32_t> asleep{0};
    std::atomic<bool> closing{false};
};

} // namespace lk
