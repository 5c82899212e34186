// Memory and threads. Running out of either never ends the process.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr long multiple_of(long unit, long count) { return (count + unit - 1) / unit * unit; }

// Zeroed memory, aligned to cache lines. Padding that is never written stays zero.
template <class T>
class Buffer {
 public:
    explicit Buffer(long count) {
        const size_t bytes = multiple_of(64, count * sizeof(T));
        data_ = static_cast<T*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64)));
        if (!data_) throw std::bad_alloc();
        std::memset(data_, 0, bytes);
    }
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    operator T*() const { return data_; }

 private:
    T* data_;
};

enum Outcome : int { DONE = 0, OUT_OF_MEMORY = 1 };

// Runs `work(next)` on at most `threads` threads. `next()` returns the index of the next item; work stops at `count`.
template <class Work>
Outcome parallel(long count, long threads, Work work) {
    std::atomic<long> taken{0};
    std::atomic<Outcome> outcome{DONE};
    const auto run = [&] {
        try {
            work([&] { return taken++; });
        } catch (const std::bad_alloc&) {
            outcome = OUT_OF_MEMORY;
            taken = count;  // the other threads stop, too
        }
    };
    std::vector<std::thread> others;
    try {
        for (long t = 1; t < std::min(threads, count); t++) others.emplace_back(run);
    } catch (const std::bad_alloc&) {  // fewer threads do all the work
    } catch (const std::system_error&) {
    }
    run();
    for (auto& other : others) other.join();
    return outcome;
}

}  // namespace
