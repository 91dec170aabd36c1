// What a group and a link have in common: lines in shared memory, waiting, closing.
#pragma once
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace argosy {

using Clock = std::chrono::steady_clock;

constexpr size_t kLine = 128;  // two cache lines: neighbours are fetched in pairs
constexpr auto kSpin = std::chrono::microseconds(5);
constexpr auto kYield = std::chrono::microseconds(100);
constexpr auto kShortestSleep = std::chrono::nanoseconds(50'000);
constexpr auto kLongestSleep = std::chrono::nanoseconds(1'000'000);
constexpr const char* kClosed = "closed by this process";

// What one side tells the others.
struct alignas(kLine) Line {
  std::atomic<uint64_t> count;
  std::atomic<uint64_t> has_left;
  uint64_t what[2];  // of a publication, by its parity: bytes and operation
};
static_assert(std::atomic<uint64_t>::is_always_lock_free && sizeof(Line) == kLine);

// One rank's end of a group or a link. A problem is told once as text; from then on the end is closed.
class End {
 public:
  explicit End(double timeout_s)
      : timeout_(std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(timeout_s))),
        timeout_s_(timeout_s) {}
  virtual ~End() = default;

  // Any thread; ends the waits on both sides.
  void close() {
    is_closed_.store(true);
    own().has_left.store(1, std::memory_order_release);
  }

 protected:
  virtual Line& own() = 0;

  // Until `has_come()`; "" or the problem. Spins for as long as a peer in step may take, then lets others have the
  // core, then sleeps for a small part of the time that it has waited: the delay stays in proportion.
  template <class HasCome>
  std::string wait(HasCome has_come, const Line& peer, int64_t peer_rank) {
    if (has_come()) return "";
    const auto begin = Clock::now();
    for (auto now = begin; now - begin < kSpin; now = Clock::now())
      for (int i = 0; i < 32; i++) {
        relax();
        if (has_come()) return "";
      }
    for (;;) {
      const auto waited = Clock::now() - begin;
      if (waited < kYield) {
        sched_yield();
      } else {
        const auto sleep = std::clamp<std::chrono::nanoseconds>(waited / 64, kShortestSleep, kLongestSleep);
        const timespec span{0, long(sleep.count())};
        nanosleep(&span, nullptr);
      }
      const bool has_left = peer.has_left.load(std::memory_order_acquire) != 0;  // before the last look
      if (has_come()) return "";
      if (is_closed()) return kClosed;
      if (has_left) return fail("rank " + std::to_string(peer_rank) + " has left");
      if (waited > timeout_)
        return fail("rank " + std::to_string(peer_rank) + " did not come within " +
                    std::to_string(int64_t(timeout_s_)) + " s");
    }
  }

  bool is_closed() const { return is_closed_.load(std::memory_order_relaxed); }

  std::string fail(std::string problem) {
    close();
    return problem;
  }

 private:
  static void relax() {
#if defined(__SSE2__)
    _mm_pause();
#endif
  }
  const Clock::duration timeout_;
  const double timeout_s_;
  std::atomic<bool> is_closed_{false};
};

}  // namespace argosy
