// Attention of single tokens at the ends of a prefix tree over the keys and values of one row and their own, on the CPU.
//
//   end_attention(q, k, v, base_k, base_v, logit_scale, output_scale, replace, q_alt, k_alt, base_k_alt, out_alt,
//                 blocks, queries, keys, sink, scaling, softcap, out)
//
// The arithmetic is that of shipsfast/ops/end_attention.py. The tree comes as blocks: some ends of one path from the root, and
// its keys in ascending depth, of which each end sees a contiguous range (shipsfast/ops/end_attention_cpp.py cuts it). Keys are
// one row's, so one task is one block of one key/value head for many rows: each tile of keys once for all of them. What an end
// gives depends neither on how rows are cut into tasks nor on how tasks are spread over threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "ships_attention.h"
#include "ships_cpu.h"
#include "ships_tiles.h"

namespace {

using namespace shipsfast;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPerTask = 240;  // queries of a task, rows x query heads x ends: what a thread's cache holds

struct Shape {
  int64_t rows, heads, kv_heads, ends, size, out_size;
};

struct Task {
  int64_t block, kv_head, first_row, last_row;
};

// T: what sums are made in; S: how tensors are stored.
template <typename T, typename S>
struct Call {
  Shape shape;
  View<S> q, k, v;              // [B, U, heads, D]
  View<S> base_k, base_v;       // [T, heads, -, D]
  View<S> q_alt, k_alt;         // [B, U, -, D]
  View<S> base_k_alt;           // [T, -, -, D]
  View<S> out_alt;              // [-, U, H, D]
  Masks<T> masks;
  const int32_t* blocks;        // [G, 4]: first and one past the last of ends, of keys
  const int32_t* end_table;     // [NU, 3]: index into q, and which of the block's keys it sees: first, one past the last
  const int32_t* keys;          // [NK]: index into base_k and base_v
  S* out;                       // [B, U, H, D of v]
};

struct Query {
  int64_t row, head, place;  // row -1: padding
  int64_t first, last;       // of the block's keys
};

// What one thread works in.
template <typename T>
struct Scratch {
  Tile<T> tile;
  std::vector<Query> queries;    // a whole number of kQueries of those over a row's own keys, then of those over others
  std::vector<T> q;              // [queries, D], scaled
  std::vector<T> out;            // [queries, width]
  std::vector<T> largest, sum;   // [queries]

  explicit Scratch(const Shape& shape) : tile(shape.size, shape.out_size) {}

  void pad() {
    while (queries.size() % kQueries) queries.push_back({-1, 0, 0, 0, 0});
  }
  void resize() {
    q.resize(queries.size() * tile.size);
    out.resize(queries.size() * tile.width);
    largest.resize(queries.size());
    sum.resize(queries.size());
  }
};

// The sink and the token itself are seen before the first key.
template <typename T, typename S>
SHIPS_ALWAYS_INLINE void begin_query(const Call<T, S>& call, const Query& query, int64_t kv_head, int64_t n, Scratch<T>& work) {
  const int64_t size = work.tile.size, width = work.tile.width;
  T* q = work.q.data() + n * size;
  T* out = work.out.data() + n * width;
  if (query.row < 0) {
    std::fill_n(q, size, T(0));
    std::fill_n(out, width, T(0));
    work.largest[n] = 0;
    work.sum[n] = 1;
    return;
  }
  const Masks<T>& masks = call.masks;
  const int64_t at = query.row * call.shape.heads + query.head;
  const int8_t flags = masks.flags(at);
  scale_into(q, (flags & kReplaceQ) ? call.q_alt.at(query.row, query.place, 0) : call.q.at(query.row, query.place, query.head),
             size, T(masks.scaling * masks.logit_scale[at]));
  const S* key = (flags & kReplaceK) ? call.k_alt.at(query.row, query.place, 0) : call.k.at(query.row, query.place, kv_head);
  T score = 0;
#pragma omp simd reduction(+ : score)
  for (int64_t d = 0; d < size; ++d) score += q[d] * widened(key[d]);
  cap(&score, 0, 1, masks.softcap);
  const T sink = masks.sink_of(query.head), top = sink > score ? sink : score;
  const T weight = exp_of(score - top);
  work.largest[n] = top;
  work.sum[n] = weight + (sink == -std::numeric_limits<T>::infinity() ? T(0) : exp_of(sink - top));
  scale_into(out, call.v.at(query.row, query.place, kv_head), call.shape.out_size, weight);
  std::fill(out + call.shape.out_size, out + width, T(0));
}

template <typename T, typename S, bool Registers>
SHIPS_ALWAYS_INLINE void run_task(const Call<T, S>& call, const Task& task, Scratch<T>& work) {
  const Shape& shape = call.shape;
  const int64_t shared = shape.heads / shape.kv_heads, first_head = task.kv_head * shared;
  const int32_t* range = call.blocks + 4 * task.block;
  const int64_t num_keys = range[3] - range[2];
  const int32_t* keys = call.keys + range[2];
  const Masks<T>& masks = call.masks;
  const auto give = [&](const Query& query) {
    return call.out + ((query.row * shape.ends + query.place) * shape.heads + query.head) * shape.out_size;
  };

  work.queries.clear();
  int64_t own = 0;
  for (const bool other : {false, true}) {
    for (int64_t row = task.first_row; row < task.last_row; ++row) {
      for (int64_t head = first_head; head < first_head + shared; ++head) {
        const int64_t at = row * shape.heads + head;
        const int8_t flags = masks.flags(at);
        const T factor = T(masks.output_scale[at]);
        if (((flags & kReplaceK) != 0) != other) continue;
        for (int64_t n = range[0]; n < range[1]; ++n) {
          const int32_t* end = call.end_table + 3 * n;
          const Query query{row, head, end[0], end[1], end[2]};
          if (factor == 0) {  // heads that are off, or replaced, need no attention
            clear(give(query), shape.out_size);
          } else if (flags & kReplaceOut) {
            scale_into(give(query), call.out_alt.at(0, query.place, head), shape.out_size, factor);
          } else {
            work.queries.push_back(query);
          }
        }
      }
    }
    work.pad();
    if (!other) own = work.queries.size();
  }
  const int64_t count = work.queries.size();
  if (count == 0) return;
  work.resize();
  for (int64_t n = 0; n < count; ++n) begin_query(call, work.queries[n], task.kv_head, n, work);

  Tile<T>& tile = work.tile;
  for (int64_t start = 0; start < num_keys; start += kTile) {
    const int64_t some = std::min<int64_t>(kTile, num_keys - start);
    if (own > 0) transpose<T, S, Registers>(tile.keys.data(), tile.size, some, tile.template zeros_of<S>(), [&](int64_t j) { return call.base_k.at(keys[start + j], task.kv_head, 0); });
    if (own < count) transpose<T, S, Registers>(tile.alt.data(), tile.size, some, tile.template zeros_of<S>(), [&](int64_t j) { return call.base_k_alt.at(keys[start + j], 0, 0); });
    load_values(tile, shape.out_size, some, [&](int64_t j) { return call.base_v.at(keys[start + j], task.kv_head, 0); });
    for (int64_t first = 0; first < count; first += kQueries) {
      int64_t begin[kQueries], end[kQueries];
      for (int64_t i = 0; i < kQueries; ++i) {
        begin[i] = std::clamp<int64_t>(work.queries[first + i].first - start, 0, some);
        end[i] = std::clamp<int64_t>(work.queries[first + i].last - start, 0, some);
      }
      attend<T>(tile, first < own ? tile.keys.data() : tile.alt.data(), some, work.q.data() + first * tile.size, begin, end,
                masks.softcap, work.out.data() + first * tile.width, &work.largest[first], &work.sum[first]);
    }
  }
  for (int64_t n = 0; n < count; ++n) {
    const Query& query = work.queries[n];
    if (query.row < 0) continue;
    const T share = T(1) / work.sum[n], factor = T(masks.output_scale[query.row * shape.heads + query.head]);
    const T* from = work.out.data() + n * tile.width;
    S* to = give(query);
    for (int64_t d = 0; d < shape.out_size; ++d) round_to(to[d], from[d] * share * factor);
  }
}

template <typename T, typename S, bool Registers>
SHIPS_ALWAYS_INLINE void run_tasks(const Call<T, S>& call, const Task* begin, const Task* end, Scratch<T>& work) {
  for (const Task* task = begin; task < end; ++task) run_task<T, S, Registers>(call, *task, work);
}

template <typename T, typename S>
std::vector<Task> cut(const Call<T, S>& call, int64_t num_blocks) {
  const Shape& shape = call.shape;
  std::vector<Task> tasks;
  for (int64_t block = 0; block < num_blocks; ++block) {
    const int64_t per_row = (call.blocks[4 * block + 1] - call.blocks[4 * block]) * (shape.heads / shape.kv_heads);
    const int64_t parts = std::min(shape.rows, (shape.rows * per_row + kPerTask - 1) / kPerTask);
    for (int64_t kv_head = 0; kv_head < shape.kv_heads; ++kv_head) {
      for (int64_t n = 0; n < parts; ++n) {
        tasks.push_back({block, kv_head, n * shape.rows / parts, (n + 1) * shape.rows / parts});
      }
    }
  }
  return tasks;
}

template <typename S>
void run(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& base_k, const Tensor& base_v,
         const MaskTensors& masks, const Tensor& base_k_alt, const Tensor& blocks, const Tensor& queries,
         const Tensor& keys, Tensor& out) {
  using T = Wide<S>;
  const Call<T, S> call{
      {out.size(0), out.size(2), k.size(1), out.size(1), q.size(3), out.size(3)},
      view<S>(q, {0, 2, 1}), view<S>(k, {0, 2, 1}), view<S>(v, {0, 2, 1}),
      view<S>(base_k, {2, 1, -1}), view<S>(base_v, {2, 1, -1}),
      view<S>(masks.q_alt, {0, 1, -1}), view<S>(masks.k_alt, {0, 1, -1}), view<S>(base_k_alt, {0, -1, -1}),
      view<S>(masks.out_alt, {-1, 1, 0}),
      Masks<T>(masks), static_cast<const int32_t*>(blocks.const_data_ptr()),
      static_cast<const int32_t*>(queries.const_data_ptr()), static_cast<const int32_t*>(keys.const_data_ptr()),
      static_cast<S*>(out.mutable_data_ptr()),
  };
  const std::vector<Task> tasks = cut(call, blocks.size(0));
  const auto go = variant<&run_tasks<T, S, false>, &run_tasks<T, S, true>>();
  torch::stable::parallel_for(0, tasks.size(), 1, [&](int64_t begin, int64_t end) {
    Scratch<T> work(call.shape);
    go(call, tasks.data() + begin, tasks.data() + end, work);
  });
}

// Whether tables lead to places that are there, and to each end once.
bool sound(const Tensor& blocks, const Tensor& queries, const Tensor& keys, int64_t ends, int64_t tokens) {
  const auto table = [](const Tensor& x, int64_t columns) {
    return x.scalar_type() == ScalarType::Int && x.is_contiguous() && x.dim() == (columns ? 2 : 1) &&
           (columns == 0 || x.size(1) == columns);
  };
  if (!table(blocks, 4) || !table(queries, 3) || !table(keys, 0) || queries.size(0) != ends) return false;
  const auto* block = static_cast<const int32_t*>(blocks.const_data_ptr());
  const auto* query = static_cast<const int32_t*>(queries.const_data_ptr());
  const auto* key = static_cast<const int32_t*>(keys.const_data_ptr());
  int64_t next = 0;
  std::vector<bool> met(ends, false);
  for (int64_t g = 0; g < blocks.size(0); ++g, block += 4) {
    if (block[0] != next || block[1] < block[0] || block[1] > ends) return false;
    if (block[2] < 0 || block[3] < block[2] || block[3] > keys.size(0)) return false;
    for (next = block[0]; next < block[1]; ++next) {
      const int32_t* end = query + 3 * next;
      if (end[0] < 0 || end[0] >= ends || met[end[0]] || end[1] < 0 || end[2] > block[3] - block[2]) return false;
      met[end[0]] = true;
    }
  }
  for (int64_t n = 0; n < keys.size(0); ++n) {
    if (key[n] < 0 || key[n] >= tokens) return false;
  }
  return next == ends;
}

void end_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& base_k, const Tensor& base_v,
                   const Tensor& logit_scale, const Tensor& output_scale, const Tensor& replace, const Tensor& q_alt,
                   const Tensor& k_alt, const Tensor& base_k_alt, const Tensor& out_alt, const Tensor& blocks,
                   const Tensor& queries, const Tensor& keys, const Tensor& sink, double scaling, double softcap, Tensor out) {
  const MaskTensors masks{logit_scale, output_scale, replace, q_alt, k_alt, out_alt, sink, scaling, softcap};
  const auto check = [](bool condition, const char* expected) { require("end_attention", condition, expected); };
  for (const Tensor* x : {&q, &k, &v, &base_k, &base_v, static_cast<const Tensor*>(&out)}) {
    check(x->dim() == 4, "q, k and v [B, heads, U, D], base_k and base_v [1, heads, T, D] and out [B, U, H, D of v]");
  }
  const ScalarType type = q.scalar_type();
  check(is_storage(type), kStorage);
  const int64_t rows = out.size(0), ends = out.size(1), heads = out.size(2), kv_heads = k.size(1), tokens = base_k.size(2);
  const auto is = [](const Tensor& x, int64_t count, int64_t second, int64_t third, int64_t last) {
    return x.size(0) == count && x.size(1) == second && x.size(2) == third && x.size(3) == last;
  };
  const int64_t size = q.size(3), out_size = out.size(3);
  check(kv_heads > 0 && heads % kv_heads == 0 && is(q, rows, heads, ends, size) && is(k, rows, kv_heads, ends, size) &&
            is(v, rows, kv_heads, ends, out_size) && is(base_k, 1, kv_heads, tokens, size) &&
            is(base_v, 1, kv_heads, tokens, out_size),
        "shapes of q, k, v, base_k, base_v and out that fit together");
  for (const Tensor* x : {&q, &k, &v, &base_k, &base_v}) {
    check(x->scalar_type() == type && contiguous_last(*x), "one dtype, and contiguous heads");
  }
  check(out.scalar_type() == type && out.is_contiguous(), "a contiguous out of the dtype of q");
  check_masks("end_attention", masks, type, rows, heads);
  check(base_k_alt.numel() == 0 || (base_k_alt.scalar_type() == type && contiguous_last(base_k_alt)),
        "replacement vectors of the dtype of q, with contiguous heads");
  const auto fits = [](const Tensor& x, int64_t first, int64_t second, int64_t third) {
    return x.numel() == 0 || (x.dim() == 3 && x.size(0) == first && x.size(1) == second && x.size(2) == third);
  };
  const bool any_out = out_alt.numel() > 0 && out_alt.dim() == 3;
  check(fits(q_alt, rows, ends, size) && fits(k_alt, rows, ends, size) &&
            fits(out_alt, any_out && out_alt.size(0) == 1 ? 1 : heads, any_out && out_alt.size(1) == 1 ? 1 : ends, out_size) &&
            (base_k_alt.numel() == 0 || (base_k_alt.dim() == 2 && base_k_alt.size(0) == tokens && base_k_alt.size(1) == size)),
        "q_alt and k_alt [B, U, D], base_k_alt [T, D] and out_alt [H or 1, U or 1, D of v]");
  check(sound(blocks, queries, keys, ends, tokens), "the tables of end_attention_cpp.plan_end_blocks");
  if (out.numel() == 0) return;
  with_storage(type, [&](auto zero) {
    run<decltype(zero)>(q, k, v, base_k, base_v, masks, base_k_alt, blocks, queries, keys, out);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(shipsfast, m) {
  m.def(
      "end_attention(Tensor q, Tensor k, Tensor v, Tensor base_k, Tensor base_v, Tensor logit_scale, Tensor output_scale, "
      "Tensor replace, Tensor q_alt, Tensor k_alt, Tensor base_k_alt, Tensor out_alt, Tensor blocks, Tensor queries, "
      "Tensor keys, Tensor sink, float scaling, float softcap, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shipsfast, CPU, m) { m.impl("end_attention", TORCH_BOX(&end_attention)); }
