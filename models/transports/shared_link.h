// A link between two pipeline stages: one ring of bytes with the sender's and the receiver's running totals.
#pragma once
#include <cstring>

#include "shared_end.h"

namespace argosy {

constexpr size_t kBurst = 256 << 10;  // bytes between two updates of a total

class Link final : public End {
 public:
  Link(char* base, size_t capacity, bool is_sender, int64_t peer_rank, double timeout_s)
      : End(timeout_s), sent_(reinterpret_cast<Line*>(base)), read_(sent_ + 1), ring_(base + 2 * kLine),
        capacity_(capacity), is_sender_(is_sender), peer_rank_(peer_rank) {}

  // Waits only while the ring is full. kind: any number that the receiver must expect.
  std::string send(const char* x, uint64_t bytes, uint64_t kind) {
    if (is_closed()) return kClosed;
    const uint64_t header[2] = {bytes, kind};
    if (std::string problem = put(header, sizeof(header)); !problem.empty()) return problem;
    if (std::string problem = put(x, bytes); !problem.empty()) return problem;
    publish();
    return "";
  }

  std::string receive(char* x, uint64_t bytes, uint64_t kind) {
    if (is_closed()) return kClosed;
    uint64_t header[2];
    if (std::string problem = take(header, sizeof(header)); !problem.empty()) return problem;
    if (header[0] != bytes || header[1] != kind)
      return fail("rank " + std::to_string(peer_rank_) + " sent " + std::to_string(header[0]) + " bytes of kind " +
                  std::to_string(header[1]) + ", expected were " + std::to_string(bytes) + " of kind " +
                  std::to_string(kind));
    if (std::string problem = take(x, bytes); !problem.empty()) return problem;
    publish();
    return "";
  }

 protected:
  Line& own() override { return is_sender_ ? *sent_ : *read_; }

 private:
  std::string put(const void* data, size_t bytes) {
    return pass(bytes, [&](size_t done, size_t at, size_t n) {
      std::memcpy(ring_ + at, static_cast<const char*>(data) + done, n);
    });
  }
  std::string take(void* data, size_t bytes) {
    return pass(bytes, [&](size_t done, size_t at, size_t n) {
      std::memcpy(static_cast<char*>(data) + done, ring_ + at, n);
    });
  }

  // Walks the ring as room (to write) or bytes (to read) come.
  template <class Copy>
  std::string pass(size_t bytes, Copy copy) {
    for (size_t done = 0; done < bytes;) {
      if (usable() == 0) {
        publish();  // the other side may be waiting for just that
        const auto has_come = [&] { return usable() > 0; };
        if (std::string problem = wait(has_come, is_sender_ ? *read_ : *sent_, peer_rank_); !problem.empty())
          return problem;
      }
      const size_t at = total_ % capacity_;
      const size_t n = std::min({bytes - done, usable(), capacity_ - at, kBurst});
      copy(done, at, n);
      done += n, total_ += n;
      if (total_ - published_ >= kBurst) publish();
    }
    return "";
  }

  size_t usable() const {
    if (is_sender_) return capacity_ - size_t(total_ - read_->count.load(std::memory_order_acquire));
    return size_t(sent_->count.load(std::memory_order_acquire) - total_);
  }
  void publish() {
    own().count.store(total_, std::memory_order_release);
    published_ = total_;
  }

  Line* const sent_;
  Line* const read_;
  char* const ring_;
  const size_t capacity_;
  const bool is_sender_;
  const int64_t peer_rank_;
  uint64_t total_ = 0, published_ = 0;  // bytes that this side has passed, and told of
};

}  // namespace argosy
