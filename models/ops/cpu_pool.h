// A small thread pool for kernels of 5 to 5,000 microseconds.
//
// A job is one word: (tasks << 24 | next task). Threads take tasks with one fetch_add, so a worker that is late,
// asleep or descheduled costs nothing: whoever is awake does the work, and a job is complete when its tasks are.
// The word tells a late worker by itself that nothing is left, so it never reads the description of a job that it
// holds no task of. Which thread runs a task can not change a bit: tasks share no sum.
#pragma once

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu_simd.h"

namespace argosy {

INLINE void relax() {
#if defined(__SSE2__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Default rounding and denormals, whatever the calling thread has set: they are part of the result.
class FloatMode {
 public:
#if defined(__SSE2__)
  FloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~FloatMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FloatMode() {}
#endif
};

// Memory that a kernel needs only while it runs; grows, never shrinks, aligned to a cache line.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  float* floats(size_t count) {
    size_t bytes = (count * sizeof(float) + 63) / 64 * 64;
    if (bytes > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(64, bytes);
      size_ = data_ ? bytes : 0;
      if (!data_) throw std::bad_alloc();
    }
    return static_cast<float*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

class Pool {
 public:
  using Task = void (*)(void* context, int64_t task, int slot);
  static constexpr int kMaxThreads = 256;

  int num_threads() const { return num_threads_; }

  // One kernel at a time owns the pool and its scratch.
  std::mutex& mutex() { return mutex_; }
  Scratch& shared() { return shared_; }
  Scratch& scratch(int slot) { return scratch_[slot]; }

  void set_num_threads(int count) {
    limit_.store(count);
    if (count < num_threads_) {
      epoch_.fetch_add(1);
      epoch_.notify_all();
      while (int(workers_.size()) >= count && !workers_.empty()) {
        workers_.back().join();
        workers_.pop_back();
      }
    }
    num_threads_ = count;
  }

  template <class F>
  void run(int64_t tasks, F&& f) {
    if (tasks <= 1 || num_threads_ == 1) {
      for (int64_t i = 0; i < tasks; i++) f(i, 0);
      return;
    }
    constexpr int64_t kMost = (int64_t(1) << 23) - 1;
    for (int64_t first = 0; first < tasks; first += kMost) {
      int64_t count = tasks - first < kMost ? tasks - first : kMost;
      auto shifted = [&](int64_t i, int slot) { f(first + i, slot); };
      dispatch(count, &call<decltype(shifted)>, &shifted);
    }
  }

 private:
  template <class F>
  static void call(void* context, int64_t task, int slot) {
    (*static_cast<F*>(context))(task, slot);
  }

  static constexpr uint64_t kNextMask = (uint64_t(1) << 24) - 1;

  void dispatch(int64_t tasks, Task function, void* context) {
    start_workers();
    function_ = function;
    context_ = context;
    done_.store(0, std::memory_order_relaxed);
    job_.store(uint64_t(tasks) << 24, std::memory_order_release);
    epoch_.fetch_add(1);
    if (sleepers_.load()) epoch_.notify_all();
    while (take(0)) {
    }
    for (int spins = 0;; spins++) {
      uint32_t done = done_.load(std::memory_order_acquire);
      if (done == uint32_t(tasks)) break;
      if (spins < 4000)
        relax();
      else
        done_.wait(done, std::memory_order_acquire);
    }
  }

  bool take(int slot) {
    uint64_t job = job_.load(std::memory_order_relaxed);
    if ((job & kNextMask) >= (job >> 24)) return false;
    job = job_.fetch_add(1, std::memory_order_acquire);
    uint64_t task = job & kNextMask, tasks = job >> 24;
    if (task >= tasks) return false;
    function_(context_, int64_t(task), slot);
    if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == uint32_t(tasks)) done_.notify_all();
    return true;
  }

  void start_workers() {
    if (int(workers_.size()) + 1 >= num_threads_) return;
    sigset_t all, before;  // signals belong to the interpreter's threads
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int slot = int(workers_.size()) + 1; slot < num_threads_; slot++)
      workers_.emplace_back([this, slot] { work(slot); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  // Kernels of a step follow each other within microseconds: spin that long, then sleep.
  void work(int slot) {
    FloatMode mode;
    using Clock = std::chrono::steady_clock;
    while (slot < limit_.load(std::memory_order_relaxed)) {
      uint32_t epoch = epoch_.load();
      if (take(slot)) continue;
      auto until = Clock::now() + std::chrono::microseconds(60);
      bool has_news = false;
      while (!has_news && Clock::now() < until)
        for (int i = 0; i < 16 && !has_news; i++) {
          relax();
          has_news = epoch_.load(std::memory_order_relaxed) != epoch;
        }
      if (has_news) continue;
      sleepers_.fetch_add(1);
      epoch_.wait(epoch);
      sleepers_.fetch_sub(1);
    }
  }

  alignas(64) std::atomic<uint64_t> job_{0};
  alignas(64) std::atomic<uint32_t> done_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<int> limit_{1};
  Task function_ = nullptr;
  void* context_ = nullptr;
  int num_threads_ = 1;
  std::mutex mutex_;
  std::vector<std::thread> workers_;
  Scratch shared_;
  Scratch scratch_[kMaxThreads];
};

// Never destroyed: its threads sleep until the process ends. A forked child has none of them, so it starts afresh.
inline Pool*& pool_slot() {
  static Pool* pool = nullptr;
  return pool;
}

inline Pool& pool() { return *pool_slot(); }

inline void create_pool() {
  pool_slot() = new Pool;
  pthread_atfork(nullptr, nullptr, [] {
    int threads = pool_slot()->num_threads();
    pool_slot() = new Pool;
    pool_slot()->set_num_threads(threads);
  });
}

}  // namespace argosy
