// Paged causal attention whose bits depend on one query and its context alone (C4, C9).
//
// Positions are cut, from 0 on, into splits of kSplit keys and those into tiles of kTile keys. Within a split: online
// softmax, tiles left to right (Milakov & Gimelshein 2018). Splits are folded left to right in the same way as tiles,
// whether one thread walks them all or each is a task of its own (split-KV, Dao et al. 2023, with a fixed length).
// Whatever a query does not see (later keys of its chunk, keys before its window, tiles of other queries) is an exact
// no-op: probability 0, factor exp(0) = 1. Only the sign of a zero could tell, and the last step drops it.
//
// Layout: key [num_blocks, kv_heads, D, block], so one vector holds a feature of 16 keys and scores need no
// reduction across lanes; value [num_blocks, kv_heads, block, D].
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu_rows.h"

namespace argosy {

constexpr int kTile = 64, kSplit = 256, kChunk = 16, kMaxHead = 256, kItemRows = 48;
// Register tile of both products: kAcross vectors wide, kDown rows high.
constexpr int kAcross = kRegisters == 32 ? 4 : 2, kDown = 6;

struct Attention {
  const float* q;  // [T, heads, D]
  const char *key, *value;
  int format;  // of key and value
  const int32_t *starts, *lengths, *table;
  int64_t rows, table_width, tokens;
  int heads, kv_heads, size;
  int64_t block, num_blocks;
  float scale;
  int64_t window;
  float *out, *lse;
};

// out[r][n] (+)= sum over k, in order, of a[r][k] * b[k][n], for R rows and `columns` (a multiple of VL) columns.
template <int R, int C>
INLINE void product_strip(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k_size, float* out,
                          int64_t ldo, bool adds) {
  vf sum[R][C];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) sum[r][c] = adds ? load<vf>(out + r * ldo + c * VL) : vf{};
  for (int64_t k = 0; k < k_size; k++) {
    vf across[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) across[c] = load<vf>(b + k * ldb + c * VL);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      vf s = splat(a[r * lda + k]);
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) sum[r][c] = fma(s, across[c], sum[r][c]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) store(out + r * ldo + c * VL, sum[r][c]);
}

template <int R>
void product(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k_size, float* out, int64_t ldo,
             int64_t columns, bool adds) {
  int64_t n = 0;
  for (; n + kAcross * VL <= columns; n += kAcross * VL)
    product_strip<R, kAcross>(a, lda, b + n, ldb, k_size, out + n, ldo, adds);
  if constexpr (kAcross > 2)
    for (; n + 2 * VL <= columns; n += 2 * VL)
      product_strip<R, 2>(a, lda, b + n, ldb, k_size, out + n, ldo, adds);
  for (; n < columns; n += VL) product_strip<R, 1>(a, lda, b + n, ldb, k_size, out + n, ldo, adds);
}

template <int R = kDown, class... Args>
INLINE void product_rows(int rows, Args... args) {
  if constexpr (R >= 1) {
    if (rows == R) return product<R>(args...);
    return product_rows<R - 1>(rows, args...);
  }
}

// Running softmax of `rows` query rows: sums of exp in VL lanes, maximum, weighted values.
struct Running {
  float *out, *sum, *max;
  int64_t width;
  static int64_t floats(int64_t rows, int64_t width) { return rows * (width + VL + 1); }
  Running(float* memory, int64_t rows, int64_t w)
      : out(memory), sum(memory + rows * w), max(memory + rows * (w + VL)), width(w) {}
  void clear(int64_t rows) {
    std::fill(out, out + rows * (width + VL), 0.0f);
    std::fill(max, max + rows, -INFINITY);
  }
  void fold(const Running& next, int64_t rows) {
    for (int64_t r = 0; r < rows; r++) {
      const float best = next.max[r] > max[r] || next.max[r] != next.max[r] ? next.max[r] : max[r];
      const float base = best == -INFINITY ? 0.0f : best;
      const vf old = splat(exp_one(max[r] - base)), fresh = splat(exp_one(next.max[r] - base));
      max[r] = best;
      for (int64_t i = 0; i < width; i += VL) {
        float* at = out + r * width + i;
        store(at, fma(load<vf>(next.out + r * width + i), fresh, load<vf>(at) * old));
      }
      store(sum + r * VL, fma(load<vf>(next.sum + r * VL), fresh, load<vf>(sum + r * VL) * old));
    }
  }
};

// Queries [first, first + count) of one batch row with one KV head: count * group query rows, query-major.
struct Item {
  int64_t row, first, count, position;  // position: of its first query
  int head;
  int64_t first_split, end_split;
  int64_t partial;  // offset of its splits' partial results in the shared scratch, or -1
};

class Walk {
 public:
  Walk(const Attention& a, const Item& item, float* memory)
      : a_(a),
        item_(item),
        group_(a.heads / a.kv_heads),
        rows_(item.count * group_),
        width_((a.size + kChunk - 1) / kChunk * kChunk) {
    q_ = memory;
    keys_ = q_ + rows_ * a.size;
    values_ = keys_ + kMaxHead * kTile;
    scores_ = values_ + kTile * kMaxHead;
    state_ = scores_ + rows_ * kTile;
    const vf scale = splat(a.scale);
    for (int64_t r = 0; r < rows_; r++) {
      const float* from = a.q + ((item.first + r / group_) * a.heads + item.head * group_ + r % group_) * a.size;
      for_vectors(a.size, [&](int64_t i, int64_t n) { store_n(q_ + r * a.size + i, load_n(from + i, n) * scale, n); });
    }
  }

  static int64_t scratch_floats(const Attention& a, int64_t rows) {
    return rows * (a.size + kTile) + 2 * kMaxHead * kTile + 2 * Running::floats(rows, kMaxHead);
  }
  int64_t rows() const { return rows_; }
  int64_t width() const { return width_; }
  float* state() { return state_; }

  // Softmax over one split, from scratch.
  void split(int64_t index, Running& run) {
    run.clear(rows_);
    const int64_t end = std::min((index + 1) * kSplit, item_.position + item_.count);
    const int64_t visible = a_.window ? std::max<int64_t>(0, item_.position - a_.window + 1) : 0;
    for (int64_t t = std::max(index * kSplit, visible / kTile * kTile); t < end; t += kTile)
      tile(t, std::min<int64_t>(kTile, end - t), std::max<int64_t>(0, visible - t), run);
  }

  void finish(const Running& run) {
    for (int64_t r = 0; r < rows_; r++) {
      const int64_t at = (item_.first + r / group_) * a_.heads + item_.head * group_ + r % group_;
      const float total = sum_of(load<vf>(run.sum + r * VL));
      const vf inverse = splat(1.0f / total);
      for_vectors(a_.size, [&](int64_t i, int64_t n) {
        store_n(a_.out + at * a_.size + i, load<vf>(run.out + r * width_ + i) * inverse + splat(0.0f), n);
      });
      a_.lse[at] = run.max[r] + float(std::log(double(total)));
    }
  }

 private:
  int64_t block_base(int64_t position) const {
    const int64_t id = a_.table[item_.row * a_.table_width + position / a_.block];
    return (id * a_.kv_heads + item_.head) * a_.block * a_.size;
  }

  // Widens keys [start, start + count) into keys_ [D][kTile]; whole chunks, what is too much gets masked.
  void load_keys(int64_t start, int64_t count) {
    for (int64_t c = 0; c < count; c += kChunk) {
      const int64_t from = block_base(start + c) + (start + c) % a_.block;
      for (int64_t d = 0; d < a_.size; d++)
        for (int i = 0; i < kChunk; i += VL)
          store(keys_ + d * kTile + c + i, load_as_float(a_.key, a_.format, from + d * a_.block + i, VL));
    }
  }

  // Widens values into values_ [kTile][width], zero outside [low, count): no stale bits meet a probability of 0.
  void load_values(int64_t start, int64_t count, int64_t low) {
    for (int64_t k = 0; k < count; k++) {
      float* to = values_ + k * width_;
      const int64_t from = block_base(start + k) + (start + k) % a_.block * a_.size;
      if (k < low) {
        std::fill(to, to + width_, 0.0f);
        continue;
      }
      for_vectors(a_.size, [&](int64_t i, int64_t n) { store(to + i, load_as_float(a_.value, a_.format, from + i, n)); });
      for (int64_t i = (a_.size + VL - 1) / VL * VL; i < width_; i += VL) store(to + i, vf{});
    }
  }

  // Probabilities of one query row; its keys [low, high) of the tile are visible. Rescales what it has so far.
  void softmax(float* scores, int64_t low, int64_t high, Running& run, int64_t r) {
    constexpr int kVectors = kTile / VL;
    const vf lowest = splat(-INFINITY);
    vf s[kVectors];
    for (int i = 0; i < kVectors; i++) s[i] = load<vf>(scores + i * VL);
    if (low > 0 || high < kTile) {
      const vi lanes = lane_index();
      for (int i = 0; i < kVectors; i++) {
        const vi at = lanes + i * VL;
        s[i] = select((at >= int32_t(low)) & (at < int32_t(high)), s[i], lowest);
      }
    }
    vf best = s[0];
    for (int i = 1; i < kVectors; i++) best = vmax(best, s[i]);
    const float top = max_of(best), before = run.max[r];
    const float now = before > top ? before : top;
    const vf base = splat(now == -INFINITY ? 0.0f : now);
    vf sum = vf{};
    for (int i = 0; i < kVectors; i++) {
      vf p = vexp(s[i] - base);
      store(scores + i * VL, p);
      sum += p;
    }
    if (now == before) {  // the factor is exactly 1
      store(run.sum + r * VL, load<vf>(run.sum + r * VL) + sum);
      return;
    }
    const vf factor = vexp(splat(before) - base);
    store(run.sum + r * VL, fma(load<vf>(run.sum + r * VL), factor, sum));
    for (int64_t i = 0; i < width_; i += VL) {
      float* at = run.out + r * width_ + i;
      store(at, load<vf>(at) * factor);
    }
    run.max[r] = now;
  }

  void tile(int64_t start, int64_t count, int64_t low, Running& run) {
    load_keys(start, count);
    load_values(start, count, low);
    for (int64_t r = 0; r < rows_; r += kDown) {
      const int rows = int(std::min<int64_t>(kDown, rows_ - r));
      const int64_t last = item_.position + (r + rows - 1) / group_;
      const int64_t high = std::min(count, last + 1 - start);
      if (high <= 0) continue;
      float* scores = scores_ + r * kTile;
      product_rows(rows, q_ + r * a_.size, int64_t(a_.size), keys_, int64_t(kTile), int64_t(a_.size), scores,
                   int64_t(kTile), int64_t(kTile), false);
      for (int64_t i = 0; i < rows; i++) {
        const int64_t position = item_.position + (r + i) / group_;
        const int64_t from = a_.window ? std::max<int64_t>(0, position - a_.window + 1 - start) : 0;
        softmax(scores + i * kTile, from, std::min<int64_t>(kTile, position + 1 - start), run, r + i);
      }
      product_rows(rows, scores, int64_t(kTile), values_, width_, high, run.out + r * width_, width_, width_, true);
    }
  }

  const Attention& a_;
  const Item& item_;
  const int64_t group_, rows_, width_;
  float *q_, *keys_, *values_, *scores_, *state_;
};

inline void check(const Attention& a) {
  int64_t end = 0;
  for (int64_t row = 0; row < a.rows; row++) {
    const int64_t start = a.starts[row], queries = a.starts[row + 1] - start, length = a.lengths[row];
    if (start != end || queries < 0 || start + queries > a.tokens)
      throw std::out_of_range("query_start_loc must rise from 0 to at most " + std::to_string(a.tokens) +
                              "; row " + std::to_string(row) + " spans " + std::to_string(start) + ".." +
                              std::to_string(start + queries));
    end = start + queries;
    if (queries == 0) continue;
    if (length < queries || length > a.table_width * a.block)
      throw std::out_of_range("seq_lens must be in " + std::to_string(queries) + ".." +
                              std::to_string(a.table_width * a.block) + " (queries..block table); got " +
                              std::to_string(length) + " in row " + std::to_string(row));
    check_range("block id", a.table + row * a.table_width, (length + a.block - 1) / a.block, a.num_blocks);
  }
  // Padding behind the last row sees nothing.
  std::fill(a.out + end * a.heads * a.size, a.out + a.tokens * a.heads * a.size, 0.0f);
  std::fill(a.lse + end * a.heads, a.lse + a.tokens * a.heads, -INFINITY);
}

inline void attention(const Attention& a) {
  check(a);
  Pool& threads = pool();
  const int64_t group = a.heads / a.kv_heads, width = (a.size + kChunk - 1) / kChunk * kChunk;
  const int64_t height = std::max<int64_t>(1, kItemRows / group);
  std::vector<Item> items;
  int64_t total = 0;
  for (int64_t row = 0; row < a.rows; row++)
    for (int64_t first = a.starts[row]; first < a.starts[row + 1]; first += height) {
      const int64_t count = std::min<int64_t>(height, a.starts[row + 1] - first);
      const int64_t position = a.lengths[row] - (a.starts[row + 1] - first);
      const int64_t visible = a.window ? std::max<int64_t>(0, position - a.window + 1) : 0;
      for (int head = 0; head < a.kv_heads; head++) {
        items.push_back({row, first, count, position, head, visible / kSplit, (position + count - 1) / kSplit + 1, -1});
        total += items.back().end_split - items.back().first_split;
      }
    }
  // An item that is a large part of the whole gives each split a task; the others are walked by one thread.
  struct Job {
    int32_t item;
    int32_t split;  // or -1: all of them
  };
  std::vector<Job> jobs;
  std::vector<int32_t> joined;
  int64_t partials = 0;
  for (size_t i = 0; i < items.size(); i++) {
    Item& item = items[i];
    const int64_t splits = item.end_split - item.first_split;
    if (threads.num_threads() == 1 || splits == 1 || splits * 8 * threads.num_threads() <= total) {
      jobs.push_back({int32_t(i), -1});
      continue;
    }
    item.partial = partials;
    partials += splits * Running::floats(item.count * group, width);
    joined.push_back(int32_t(i));
    for (int64_t s = item.first_split; s < item.end_split; s++) jobs.push_back({int32_t(i), int32_t(s)});
  }
  float* shared = partials ? threads.shared().floats(size_t(partials)) : nullptr;
  const size_t floats = size_t(Walk::scratch_floats(a, height * group));
  auto partial = [&](const Item& item, int64_t split) {
    const int64_t rows = item.count * group;
    return Running(shared + item.partial + (split - item.first_split) * Running::floats(rows, width), rows, width);
  };
  threads.run(int64_t(jobs.size()), [&](int64_t task, int slot) {
    const Job& job = jobs[size_t(task)];
    const Item& item = items[size_t(job.item)];
    Walk walk(a, item, threads.scratch(slot).floats(floats));
    if (job.split >= 0) {
      Running run = partial(item, job.split);
      return walk.split(job.split, run);
    }
    Running all(walk.state(), walk.rows(), width);
    Running one(walk.state() + Running::floats(walk.rows(), width), walk.rows(), width);
    walk.split(item.first_split, all);
    for (int64_t s = item.first_split + 1; s < item.end_split; s++) {
      walk.split(s, one);
      all.fold(one, walk.rows());
    }
    walk.finish(all);
  });
  threads.run(int64_t(joined.size()), [&](int64_t task, int slot) {
    const Item& item = items[size_t(joined[size_t(task)])];
    Walk walk(a, item, threads.scratch(slot).floats(floats));
    Running all = partial(item, item.first_split);
    for (int64_t s = item.first_split + 1; s < item.end_split; s++) all.fold(partial(item, s), walk.rows());
    walk.finish(all);
  });
}

struct RopeStore {
  const float* qkv;
  const int32_t *positions, *slots;
  const float* cos_sin;  // [.., 2 * half] or null
  int64_t half, max_positions;
  char *key, *value;
  int format;
  int64_t block, num_blocks, tokens;
  int heads, kv_heads, size;
  float* q;
};

INLINE void rotate(const float* from, float* to, const float* cosines, int64_t half, int64_t size) {
  if (!cosines) {
    std::copy(from, from + size, to);
    return;
  }
  for_vectors(half, [&](int64_t i, int64_t n) {
    const vf c = load_n(cosines + i, n), s = load_n(cosines + half + i, n);
    const vf x = load_n(from + i, n), y = load_n(from + half + i, n);
    store_n(to + i, fma(-y, s, x * c), n);
    store_n(to + half + i, fma(x, s, y * c), n);
  });
  std::copy(from + 2 * half, from + size, to + 2 * half);
}

inline void rope_store(const RopeStore& a) {
  const int64_t all = a.heads + 2 * a.kv_heads;
  check_range("slot", a.slots, a.tokens, a.num_blocks * a.block);
  if (a.cos_sin) check_range("position", a.positions, a.tokens, a.max_positions);
  for_rows(a.tokens, all * a.size * 2, [&](int64_t t) {
    const float* from = a.qkv + t * all * a.size;
    const float* cosines = a.cos_sin ? a.cos_sin + a.positions[t] * 2 * a.half : nullptr;
    for (int h = 0; h < a.heads; h++)
      rotate(from + h * a.size, a.q + (t * a.heads + h) * a.size, cosines, a.half, a.size);
    const int64_t block = a.slots[t] / a.block, offset = a.slots[t] % a.block;
    for (int h = 0; h < a.kv_heads; h++) {
      const int64_t base = (block * a.kv_heads + h) * a.block * a.size;
      const float* v = from + (a.heads + a.kv_heads + h) * a.size;
      float k[kMaxHead];
      rotate(from + (a.heads + h) * a.size, k, cosines, a.half, a.size);
      if (a.format == kBfloat16) {
        uint16_t* key = reinterpret_cast<uint16_t*>(a.key) + base + offset;
        uint16_t* value = reinterpret_cast<uint16_t*>(a.value) + base + offset * a.size;
        for (int64_t d = 0; d < a.size; d++) key[d * a.block] = narrow(k[d]);
        int64_t d = 0;
        for (; d + VL <= a.size; d += VL) store(value + d, narrow(load<vf>(v + d)));
        for (; d < a.size; d++) value[d] = narrow(v[d]);
      } else {
        float* key = reinterpret_cast<float*>(a.key) + base + offset;
        for (int64_t d = 0; d < a.size; d++) key[d * a.block] = k[d];
        std::copy(v, v + a.size, reinterpret_cast<float*>(a.value) + base + offset * a.size);
      }
    }
  });
}

}  // namespace argosy
