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

#include "cpu_product.h"

namespace argosy {

constexpr int kSplit = 256, kItemRows = 48;

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
  float softcap;  // or 0
  float *out, *lse;
};

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
      const vf old = vexp(splat(max[r] - base)), fresh = vexp(splat(next.max[r] - base));
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
  int64_t end() const { return position + count; }
};

INLINE int64_t padded(int64_t size) { return (size + kChunk - 1) / kChunk * kChunk; }

template <class Cell>
class Walk {
 public:
  Walk(const Attention& a, const Item& item, float* memory)
      : a_(a), item_(item), group_(a.heads / a.kv_heads), rows_(item.count * group_), width_(padded(a.size)) {
    q_ = memory;
    keys_ = q_ + rows_ * a.size;
    values_ = keys_ + kTile * width_;
    scores_ = values_ + kTile * width_;
    state_ = scores_ + rows_ * kTile;
  }

  static int64_t scratch_floats(const Attention& a, int64_t rows) {
    const int64_t width = padded(a.size);
    return rows * (a.size + kTile) + 2 * kTile * width + 2 * Running::floats(rows, width);
  }

  void all_splits() {
    Running all(state_, rows_, width_), one(state_ + Running::floats(rows_, width_), rows_, width_);
    scale_queries();
    split(item_.first_split, all);
    for (int64_t s = item_.first_split + 1; s < item_.end_split; s++) {
      split(s, one);
      all.fold(one, rows_);
    }
    finish(all);
  }

  void one_split(int64_t index, Running run) {
    scale_queries();
    split(index, run);
  }

  void finish(const Running& run) {
    for (int64_t r = 0; r < rows_; r++) {
      const int64_t at = output_row(r);
      const float total = sum_of(load<vf>(run.sum + r * VL));
      const vf inverse = splat(1.0f / total);
      for_vectors(a_.size, [&](int64_t i, int64_t n) {
        store_n(a_.out + at * a_.size + i, load<vf>(run.out + r * width_ + i) * inverse + splat(0.0f), n);
      });
      a_.lse[at] = run.max[r] + float(std::log(double(total)));
    }
  }

 private:
  int64_t output_row(int64_t r) const {
    return (item_.first + r / group_) * a_.heads + item_.head * group_ + r % group_;
  }

  void scale_queries() {
    const vf scale = splat(a_.scale);
    for (int64_t r = 0; r < rows_; r++) {
      const float* from = a_.q + output_row(r) * a_.size;
      for_vectors(a_.size, [&](int64_t i, int64_t n) { store_n(q_ + r * a_.size + i, load_n(from + i, n) * scale, n); });
    }
  }

  // Softmax over one split, from nothing.
  void split(int64_t index, Running& run) {
    run.clear(rows_);
    const int64_t end = std::min((index + 1) * kSplit, item_.end());
    const int64_t visible = a_.window ? std::max<int64_t>(0, item_.position - a_.window + 1) : 0;
    int64_t start = std::max(index * kSplit, visible / kTile * kTile);
    Pages<Cell> here = pages(start);
    fetch(here);
    for (; start < end; start += kTile) {
      const Pages<Cell> next = start + kTile < end ? pages(start + kTile) : here;
      tile(start, std::min<int64_t>(kTile, end - start), std::max<int64_t>(0, visible - start), here, next, run);
      here = next;
    }
  }

  // Chunks behind the context repeat the last one: they are read and masked.
  Pages<Cell> pages(int64_t start) const {
    Pages<Cell> found;
    const int64_t last = (item_.end() - 1) / kChunk * kChunk;
    for (int c = 0; c < kChunks; c++) {
      const int64_t at = std::min(start + c * kChunk, last), offset = at % a_.block;
      const int64_t id = a_.table[item_.row * a_.table_width + at / a_.block];
      const int64_t base = (id * a_.kv_heads + item_.head) * a_.block * a_.size;
      found.keys[c] = reinterpret_cast<const Cell*>(a_.key) + base + offset;
      found.values[c] = reinterpret_cast<const Cell*>(a_.value) + base + offset * a_.size;
    }
    return found;
  }

  // A split's first tile has nobody to fetch it ahead: ask for all of it at once.
  void fetch(const Pages<Cell>& tile) const {
    constexpr int64_t kLine = 64 / sizeof(Cell);
    for (int c = 0; c < kChunks; c++)
      for (int64_t i = 0; i < kChunk * a_.size; i += kLine) {
        if (a_.block == kChunk) __builtin_prefetch(tile.keys[c] + i, 0, 3);
        __builtin_prefetch(tile.values[c] + i, 0, 3);
      }
  }

  void tile(int64_t start, int64_t count, int64_t low, const Pages<Cell>& here, const Pages<Cell>& next,
            Running& run) {
    const bool is_direct = rows_ <= kDown && a_.size % VL == 0;
    if (!is_direct) widen_tile(count, low, here, next);
    for (int64_t r = 0; r < rows_; r += kDown) {
      const int rows = int(std::min<int64_t>(kDown, rows_ - r));
      const int64_t last = item_.position + (r + rows - 1) / group_;
      const int64_t high = std::min(count, last + 1 - start);
      if (high <= 0) continue;
      const float* q = q_ + r * a_.size;
      float *scores = scores_ + r * kTile, *out = run.out + r * width_;
      with_rows(rows, [&]<int R>() {
        if (is_direct)
          score_pages<R>(q, a_.size, here, next, a_.block, scores);
        else
          product<R>(q, a_.size, keys_, kTile, a_.size, scores, kTile, kTile, false);
        for (int i = 0; i < R; i++) {
          const int64_t position = item_.position + (r + i) / group_;
          const int64_t from = a_.window ? std::max<int64_t>(0, position - a_.window + 1 - start) : 0;
          softmax(scores + i * kTile, from, std::min<int64_t>(kTile, position + 1 - start), run, r + i);
        }
        if (is_direct)
          mix_pages<R>(scores, a_.size, here, next, low, high, out, width_);
        else
          product<R>(scores, kTile, values_, width_, high, out, width_, width_, true);
      });
    }
  }

  // Keys into keys_ [D][kTile]; values into values_ [kTile][width], zero outside [low, count), so that nothing stale
  // meets a probability of 0 (0 * inf is not 0).
  void widen_tile(int64_t count, int64_t low, const Pages<Cell>& here, const Pages<Cell>& next) {
    for (int64_t d = 0; d < a_.size; d++)
      for (int c = 0; c < kChunks; c++) {
        for (int i = 0; i < kChunk; i += VL)
          store(keys_ + d * kTile + c * kChunk + i, widen_at(here.keys[c] + d * a_.block + i));
        __builtin_prefetch(next.keys[c] + d * a_.block, 0, 3);
      }
    for (int64_t k = 0; k < count; k++) {
      float* to = values_ + k * width_;
      if (k < low) {
        std::fill(to, to + width_, 0.0f);
        continue;
      }
      const Cell* from = here.values[k / kChunk] + k % kChunk * a_.size;
      const Cell* ahead = next.values[k / kChunk] + k % kChunk * a_.size;
      int64_t i = 0;
      for (; i + VL <= a_.size; i += VL) {
        store(to + i, widen_at(from + i));
        __builtin_prefetch(ahead + i, 0, 3);
      }
      for (; i < width_; i++) to[i] = i < a_.size ? widen(from[i]) : 0.0f;
    }
  }

  // Probabilities of one query row; its keys [low, high) of the tile are visible. Rescales what it has so far.
  void softmax(float* scores, int64_t low, int64_t high, Running& run, int64_t r) {
    constexpr int kVectors = kTile / VL;
    const vf lowest = splat(-INFINITY);
    vf s[kVectors];
    for (int i = 0; i < kVectors; i++) s[i] = load<vf>(scores + i * VL);
    if (a_.softcap > 0) {
      const vf cap = splat(a_.softcap), inverse = splat(1.0f / a_.softcap);
      for (int i = 0; i < kVectors; i++) s[i] = soft_capped(s[i], cap, inverse);
    }
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

  const Attention& a_;
  const Item& item_;
  const int64_t group_, rows_, width_;
  float *q_, *keys_, *values_, *scores_, *state_;
};

// Refuses a plan that points outside the cache, before anything is written.
inline void check(const Attention& a) {
  int64_t end = 0;
  for (int64_t row = 0; row < a.rows; row++) {
    const int64_t start = a.starts[row], queries = a.starts[row + 1] - start, length = a.lengths[row];
    if (start != end || queries < 0 || start + queries > a.tokens)
      throw std::out_of_range("query_start_loc must rise from 0 to at most " + std::to_string(a.tokens) + "; row " +
                              std::to_string(row) + " spans " + std::to_string(start) + ".." +
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

template <class Cell>
void attend(const Attention& a) {
  Pool& threads = pool();
  const int64_t group = a.heads / a.kv_heads, width = padded(a.size);
  const int64_t height = std::max<int64_t>(1, kItemRows / group);
  std::vector<Item> items;
  int64_t total = 0;
  for (int64_t row = 0; row < a.rows; row++)
    for (int64_t first = a.starts[row]; first < a.starts[row + 1]; first += height) {
      const int64_t count = std::min<int64_t>(height, a.starts[row + 1] - first);
      const int64_t position = a.lengths[row] - (a.starts[row + 1] - first);
      const int64_t visible = a.window ? std::max<int64_t>(0, position - a.window + 1) : 0;
      const int64_t first_split = visible / kSplit, end_split = (position + count - 1) / kSplit + 1;
      for (int head = 0; head < a.kv_heads; head++)
        items.push_back({row, first, count, position, head, first_split, end_split, -1});
      total += (end_split - first_split) * a.kv_heads;
    }
  // An item that is a large part of the whole gives each split a task; the others are walked by one thread.
  struct Job {
    int32_t item;
    int64_t split;  // or -1: all of them
  };
  std::vector<Job> jobs;
  std::vector<int32_t> joined;
  int64_t partials = 0;
  for (int32_t i = 0; i < int32_t(items.size()); i++) {
    Item& item = items[i];
    const int64_t splits = item.end_split - item.first_split;
    if (threads.num_threads() == 1 || splits == 1 || splits * 8 * threads.num_threads() <= total) {
      jobs.push_back({i, -1});
      continue;
    }
    item.partial = partials;
    partials += splits * Running::floats(item.count * group, width);
    joined.push_back(i);
    for (int64_t s = item.first_split; s < item.end_split; s++) jobs.push_back({i, s});
  }
  float* shared = partials ? threads.shared().floats(size_t(partials)) : nullptr;
  const size_t floats = size_t(Walk<Cell>::scratch_floats(a, height * group));
  auto partial = [&](const Item& item, int64_t split) {
    const int64_t rows = item.count * group;
    return Running(shared + item.partial + (split - item.first_split) * Running::floats(rows, width), rows, width);
  };
  threads.run(int64_t(jobs.size()), [&](int64_t task, int slot) {
    const Job& job = jobs[size_t(task)];
    const Item& item = items[size_t(job.item)];
    Walk<Cell> walk(a, item, threads.scratch(slot).floats(floats));
    if (job.split < 0)
      walk.all_splits();
    else
      walk.one_split(job.split, partial(item, job.split));
  });
  threads.run(int64_t(joined.size()), [&](int64_t task, int slot) {
    const Item& item = items[size_t(joined[size_t(task)])];
    Walk<Cell> walk(a, item, threads.scratch(slot).floats(floats));
    Running all = partial(item, item.first_split);
    for (int64_t s = item.first_split + 1; s < item.end_split; s++) all.fold(partial(item, s), item.count * group);
    walk.finish(all);
  });
}

inline void attention(const Attention& a) {
  check(a);
  if (a.format == kBfloat16)
    attend<Brain>(a);
  else if (a.format == kFloat16)
    attend<Half>(a);
  else
    attend<float>(a);
}

}  // namespace argosy
