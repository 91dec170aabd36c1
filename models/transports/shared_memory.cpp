// Tensors between the ranks of one host, through memory that all of them have mapped (shared_memory.py).
//
// A group: every rank has a line with a counter and two slots. Publication number s goes to slot s % 2; a rank
// publishes s + 1 only after it has read everybody's s, so whoever has seen all s + 1 may overwrite slot s % 2.
// A link: one ring of bytes with the sender's and the receiver's running totals.
//
// The wrapper owns every check; here an address is taken as true. Objects are for one thread, except `close`.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <string>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kLine = 128;  // two cache lines: neighbours are fetched in pairs
constexpr auto kSpin = std::chrono::microseconds(5);
constexpr auto kYield = std::chrono::microseconds(100);
constexpr auto kShortestSleep = std::chrono::nanoseconds(50'000);
constexpr auto kLongestSleep = std::chrono::nanoseconds(1'000'000);
constexpr size_t kSliced = 16 << 10;  // bytes from which three or more ranks divide the additions
constexpr size_t kBurst = 256 << 10;  // bytes of a link between two updates of its totals
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

// IEEE arithmetic with denormals, whatever the thread is set to: the same bits on every rank.
class IeeeMode {
 public:
#if defined(__SSE2__)
  IeeeMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~IeeeMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
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

// --- Python ---------------------------------------------------------------------------------------

constexpr const char* kName = "models.transports.End";

void destroy(PyObject* capsule) { delete static_cast<End*>(PyCapsule_GetPointer(capsule, kName)); }

template <class T>
T* unwrap(PyObject* capsule) {
  auto* end = static_cast<End*>(PyCapsule_GetPointer(capsule, kName));
  auto* wanted = dynamic_cast<T*>(end);
  if (end && !wanted) PyErr_SetString(PyExc_TypeError, "a group is no link, and a link no group");
  return wanted;
}

// Without the interpreter lock; None or the problem.
template <class F>
PyObject* launch(F&& f) {
  std::string problem;
  Py_BEGIN_ALLOW_THREADS;
  problem = f();
  Py_END_ALLOW_THREADS;
  if (problem.empty()) Py_RETURN_NONE;
  return PyUnicode_FromStringAndSize(problem.data(), Py_ssize_t(problem.size()));
}

PyObject* py_open_group(PyObject*, PyObject* args) {
  unsigned long long base;
  long long rank, size, slot_bytes, first_rank;
  double timeout_s;
  if (!PyArg_ParseTuple(args, "KLLLLd", &base, &rank, &size, &slot_bytes, &first_rank, &timeout_s)) return nullptr;
  End* end = new Group(reinterpret_cast<char*>(base), rank, size, size_t(slot_bytes), first_rank, timeout_s);
  return PyCapsule_New(end, kName, destroy);
}

PyObject* py_open_link(PyObject*, PyObject* args) {
  unsigned long long base;
  long long capacity, peer_rank;
  int is_sender;
  double timeout_s;
  if (!PyArg_ParseTuple(args, "KLpLd", &base, &capacity, &is_sender, &peer_rank, &timeout_s)) return nullptr;
  End* end = new Link(reinterpret_cast<char*>(base), size_t(capacity), is_sender != 0, peer_rank, timeout_s);
  return PyCapsule_New(end, kName, destroy);
}

PyObject* py_all_reduce(PyObject*, PyObject* args) {
  PyObject* capsule;
  unsigned long long x;
  long long bytes;
  if (!PyArg_ParseTuple(args, "OKL", &capsule, &x, &bytes)) return nullptr;
  auto* group = unwrap<Group>(capsule);
  if (!group) return nullptr;
  return launch([&] { return group->all_reduce(reinterpret_cast<char*>(x), size_t(bytes)); });
}

PyObject* py_all_gather(PyObject*, PyObject* args) {
  PyObject* capsule;
  unsigned long long x, out;
  long long bytes;
  if (!PyArg_ParseTuple(args, "OKLK", &capsule, &x, &bytes, &out)) return nullptr;
  auto* group = unwrap<Group>(capsule);
  if (!group) return nullptr;
  return launch([&] {
    return group->all_gather(reinterpret_cast<const char*>(x), size_t(bytes), reinterpret_cast<char*>(out));
  });
}

PyObject* py_send(PyObject*, PyObject* args) {
  PyObject* capsule;
  unsigned long long x;
  long long bytes, kind;
  if (!PyArg_ParseTuple(args, "OKLL", &capsule, &x, &bytes, &kind)) return nullptr;
  auto* link = unwrap<Link>(capsule);
  if (!link) return nullptr;
  return launch([&] { return link->send(reinterpret_cast<const char*>(x), uint64_t(bytes), uint64_t(kind)); });
}

PyObject* py_receive(PyObject*, PyObject* args) {
  PyObject* capsule;
  unsigned long long x;
  long long bytes, kind;
  if (!PyArg_ParseTuple(args, "OKLL", &capsule, &x, &bytes, &kind)) return nullptr;
  auto* link = unwrap<Link>(capsule);
  if (!link) return nullptr;
  return launch([&] { return link->receive(reinterpret_cast<char*>(x), uint64_t(bytes), uint64_t(kind)); });
}

PyObject* py_close(PyObject*, PyObject* capsule) {
  auto* end = unwrap<End>(capsule);
  if (!end) return nullptr;
  end->close();
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"open_group", py_open_group, METH_VARARGS, nullptr}, {"open_link", py_open_link, METH_VARARGS, nullptr},
    {"all_reduce", py_all_reduce, METH_VARARGS, nullptr}, {"all_gather", py_all_gather, METH_VARARGS, nullptr},
    {"send", py_send, METH_VARARGS, nullptr},             {"receive", py_receive, METH_VARARGS, nullptr},
    {"close", py_close, METH_O, nullptr},                 {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_shared_memory", "Tensors between the ranks of one host.", -1, methods,
    nullptr,               nullptr,          nullptr,                                  nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__shared_memory() {
  PyObject* module = PyModule_Create(&definition);
  if (module && PyModule_AddIntConstant(module, "LINE_BYTES", kLine) != 0) Py_CLEAR(module);
  return module;
}
