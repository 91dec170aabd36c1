// A tensor-parallel group in shared memory.
//
// Every rank has a line with a counter and two slots. Publication number s goes to slot s % 2; a rank publishes s + 1
// only after it has read everybody's s, so whoever has seen all s + 1 may overwrite slot s % 2.
#pragma once
#include <cstring>

#include "shared_end.h"

namespace argosy {

constexpr size_t kSliced = 16 << 10;  // bytes from which three or more ranks divide the additions

// IEEE arithmetic with denormals, whatever the thread is set to: the same bits on every rank.
class IeeeMode {
 public:
#if defined(__SSE2__)
  IeeeMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~IeeeMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  IeeeMode() {}
#endif
};

class Group final : public End {
 public:
  Group(char* base, int64_t rank, int64_t size, size_t slot_bytes, int64_t first_rank, double timeout_s)
      : End(timeout_s), base_(base), rank_(rank), size_(size), slot_bytes_(slot_bytes), first_rank_(first_rank) {}

  // x[0:bytes] of fp32 becomes the sum over the ranks, added in rank order.
  std::string all_reduce(char* x, size_t bytes) {
    if (is_closed()) return kClosed;
    const IeeeMode mode;
    for (size_t done = 0; done < bytes; done += slot_bytes_) {
      const size_t piece = std::min(slot_bytes_, bytes - done);
      std::string problem = size_ > 2 && piece >= kSliced ? sliced(x + done, piece) : whole(x + done, piece);
      if (!problem.empty()) return problem;
    }
    return "";
  }

  // out[r * bytes : (r + 1) * bytes] becomes rank r's x[0:bytes].
  std::string all_gather(const char* x, size_t bytes, char* out) {
    if (is_closed()) return kClosed;
    for (size_t done = 0; done < bytes; done += slot_bytes_) {
      const size_t piece = std::min(slot_bytes_, bytes - done);
      std::memcpy(slot(rank_, sequence_ + 1), x + done, piece);
      if (std::string problem = meet(kGather, piece); !problem.empty()) return problem;
      for (int64_t r = 0; r < size_; r++) std::memcpy(out + r * bytes + done, slot(r, sequence_), piece);
    }
    return "";
  }

 protected:
  Line& own() override { return line(rank_); }

 private:
  enum What : uint64_t { kReduce = 1, kSum = 2, kGather = 3 };

  // Every rank adds everything up.
  std::string whole(char* x, size_t bytes) {
    std::memcpy(slot(rank_, sequence_ + 1), x, bytes);
    if (std::string problem = meet(kReduce, bytes); !problem.empty()) return problem;
    add(reinterpret_cast<float*>(x), 0, bytes / sizeof(float));
    return "";
  }

  // Every rank adds up its slice and takes the others' sums.
  std::string sliced(char* x, size_t bytes) {
    std::memcpy(slot(rank_, sequence_ + 1), x, bytes);
    if (std::string problem = meet(kReduce, bytes); !problem.empty()) return problem;
    const int64_t count = int64_t(bytes / sizeof(float));
    const auto bound = [&](int64_t r) { return size_t(count * r / size_); };
    auto* sums = reinterpret_cast<float*>(slot(rank_, sequence_ + 1));
    add(sums + bound(rank_), bound(rank_), bound(rank_ + 1) - bound(rank_));
    if (std::string problem = meet(kSum, bytes); !problem.empty()) return problem;
    for (int64_t r = 0; r < size_; r++) {
      const size_t start = bound(r) * sizeof(float), end = bound(r + 1) * sizeof(float);
      std::memcpy(x + start, slot(r, sequence_) + start, end - start);
    }
    return "";
  }

  // out[0:count] = elements from `first` on of the present slots, in rank order; by strips that stay in the cache.
  void add(float* out, size_t first, size_t count) {
    constexpr size_t kStrip = 2048;
    for (size_t at = 0; at < count; at += kStrip) {
      const size_t n = std::min(kStrip, count - at);
      float* __restrict__ to = out + at;
      const float* __restrict__ a = floats(0) + first + at;
      const float* __restrict__ b = floats(1) + first + at;
      for (size_t i = 0; i < n; i++) to[i] = a[i] + b[i];
      for (int64_t r = 2; r < size_; r++) {
        const float* __restrict__ c = floats(r) + first + at;
        for (size_t i = 0; i < n; i++) to[i] += c[i];
      }
    }
  }

  // Publish the own slot and wait for everybody's.
  std::string meet(What operation, size_t bytes) {
    const uint64_t number = ++sequence_, what = uint64_t(bytes) << 8 | operation;
    own().what[number & 1] = what;
    own().count.store(number, std::memory_order_release);
    for (int64_t r = 0; r < size_; r++) {
      if (r == rank_) continue;
      const Line& peer = line(r);
      const auto has_come = [&] { return peer.count.load(std::memory_order_acquire) >= number; };
      if (std::string problem = wait(has_come, peer, first_rank_ + r); !problem.empty()) return problem;
      if (peer.what[number & 1] != what)
        return fail("rank " + std::to_string(first_rank_ + r) + " is at " + told(peer.what[number & 1]) +
                    ", this rank at " + told(what));
    }
    return "";
  }

  static std::string told(uint64_t what) {
    return ((what & 255) == kGather ? "a gather of " : "a reduction of ") + std::to_string(what >> 8) + " bytes";
  }
  Line& line(int64_t r) { return reinterpret_cast<Line*>(base_)[r]; }
  char* slot(int64_t r, uint64_t number) {
    return base_ + size_ * kLine + (size_t(r) * 2 + (number & 1)) * slot_bytes_;
  }
  const float* floats(int64_t r) { return reinterpret_cast<const float*>(slot(r, sequence_)); }

  char* const base_;
  const int64_t rank_, size_;
  const size_t slot_bytes_;
  const int64_t first_rank_;
  uint64_t sequence_ = 0;
};

}  // namespace argosy
