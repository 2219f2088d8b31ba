// Attention over a packed prefix tree with per-head mask vectors, on the CPU.
//
//   tree_attention(q, k, v, logit_scale, output_scale, replace, q_alt, k_alt, out_alt, blocks, queries, keys,
//                  sink, scaling, softcap, out)
//
// The arithmetic is that of shipsfast/ops/reference.py. The tree comes as blocks: some queries, and the keys of the path
// they lie on in ascending depth, of which each query sees a contiguous range (shipsfast/ops/tree_attention_cpp.py cuts it).
// One task is one block of one row and key/value head. It goes through its keys in tiles, each tile once for all
// query heads that share it, with a running maximum and sum per query (Milakov & Gimelshein, arXiv 1805.02867), so
// that nothing of size queries x keys exists. No result depends on how tasks are spread over threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "ships_attention.h"
#include "ships_cpu.h"
#include "ships_exp.h"

// Vectors are passed between functions that are always inlined, so their ABI never shows.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace {

using namespace shipsfast;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kTile = 64;     // keys at a time
constexpr int kQueries = 6;   // queries at a time: with two vectors each, twelve accumulators

struct Shape {
  int64_t rows, heads, kv_heads, queries, size, out_size;
};

template <typename T>
struct Call {
  Shape shape;
  View<T> q, k, v;              // [B, T, heads, D]
  View<T> q_alt, k_alt;         // [B, T, -, D]
  View<T> out_alt;              // [-, T, H, D]
  Masks<T> masks;
  const int32_t* blocks;        // [G, 4]: first and one past the last of queries, of keys
  const int32_t* query_table;   // [NQ, 3]: index into q, and which of the block's keys it sees: first, one past the last
  const int32_t* keys;          // [NK]: index into k and v
  int64_t num_blocks;
  T* out;                       // [B, TQ, H, D of v]
};

template <typename T>
struct Lanes {
  typedef T Vec __attribute__((vector_size(64)));
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Whole;
  typedef Whole Index __attribute__((vector_size(64)));
  static constexpr int count = 64 / sizeof(T);
};

template <typename T>
SHIPS_ALWAYS_INLINE typename Lanes<T>::Vec load(const T* from) {
  typename Lanes<T>::Vec out;
  __builtin_memcpy(&out, from, sizeof out);
  return out;
}

template <typename T>
SHIPS_ALWAYS_INLINE void store(T* to, typename Lanes<T>::Vec value) {
  __builtin_memcpy(to, &value, sizeof value);
}

// out[i][0 .. 2 * lanes) += sum over n of left[n * left_step + i * left_row] * right[n * right_stride + ...], for
// kQueries rows i.
template <typename T>
SHIPS_ALWAYS_INLINE void multiply_add(const T* left, int64_t left_step, int64_t left_row, const T* right,
                                      int64_t right_stride, int64_t first, int64_t last, T* out, int64_t out_stride) {
  using Vec = typename Lanes<T>::Vec;
  constexpr int lanes = Lanes<T>::count;
  Vec sum[kQueries][2];
  for (int i = 0; i < kQueries; ++i) {
    sum[i][0] = load(out + i * out_stride);
    sum[i][1] = load(out + i * out_stride + lanes);
  }
  for (int64_t n = first; n < last; ++n) {
    const Vec a = load(right + n * right_stride), b = load(right + n * right_stride + lanes);
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i) {
      const T factor = left[n * left_step + i * left_row];
      sum[i][0] += factor * a;
      sum[i][1] += factor * b;
    }
  }
  for (int i = 0; i < kQueries; ++i) {
    store(out + i * out_stride, sum[i][0]);
    store(out + i * out_stride + lanes, sum[i][1]);
  }
}

// What one thread works in. Tiles are padded with zeros to whole vectors.
template <typename T>
struct Scratch {
  int64_t size, width;           // D, and D of v padded to two vectors
  std::vector<T> q;              // [query heads, queries, D], scaled
  std::vector<T> zeros;          // [D]
  std::vector<T> keys, alt;      // [D, kTile], the keys of a tile and those that replace them
  std::vector<T> values;         // [kTile, width]
  std::vector<T> scores;         // [kQueries, kTile]
  std::vector<T> out;            // [query heads, queries, width]
  std::vector<T> largest, sum;   // [query heads, queries]

  explicit Scratch(const Shape& shape, int64_t most_queries) {
    constexpr int64_t pair = 2 * Lanes<T>::count;
    const int64_t shared = shape.heads / shape.kv_heads;
    const int64_t queries = (most_queries + kQueries - 1) / kQueries * kQueries;
    size = shape.size;
    width = (shape.out_size + pair - 1) / pair * pair;
    q.resize(shared * queries * size);
    zeros.resize(size);
    keys.resize(size * kTile);
    alt.resize(size * kTile);
    values.resize(kTile * width);
    scores.resize(kQueries * kTile);
    out.resize(shared * queries * width);
    largest.resize(shared * queries);
    sum.resize(shared * queries);
  }
};

#if !defined(__clang__)
// One stage of transposing a square of vectors: swap the blocks off the diagonal of every 2 S x 2 S block.
template <typename T, int S>
SHIPS_ALWAYS_INLINE void swap_blocks(typename Lanes<T>::Vec* rows) {
  constexpr int lanes = Lanes<T>::count;
  typename Lanes<T>::Index low, high;
  for (int j = 0; j < lanes; ++j) {
    low[j] = (j & S) ? lanes + j - S : j;
    high[j] = (j & S) ? lanes + j : j + S;
  }
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    if (i & S) continue;
    const typename Lanes<T>::Vec a = rows[i], b = rows[i + S];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + S] = __builtin_shuffle(a, b, high);
  }
  if constexpr (2 * S < lanes) swap_blocks<T, 2 * S>(rows);
}
#endif

// Keys of a tile with their dimensions in rows: to[d][j] = from(j)[d], zero from `count` to a whole pair of vectors.
// Wide: vectors are registers, and squares of them are transposed there. zeros: size of them.
template <typename T, bool Wide, typename From>
SHIPS_ALWAYS_INLINE void transpose(T* to, int64_t size, int64_t count, const T* zeros, const From& from) {
  constexpr int lanes = Lanes<T>::count;
  const int64_t padded = (count + 2 * lanes - 1) / (2 * lanes) * (2 * lanes);
  for (int64_t j = 0; j < padded; j += lanes) {
    const T* key[lanes];
    for (int64_t n = 0; n < lanes; ++n) key[n] = j + n < count ? from(j + n) : zeros;
    int64_t d = 0;
#if !defined(__clang__)
    if constexpr (Wide) {
      for (; d + lanes <= size; d += lanes) {
        typename Lanes<T>::Vec rows[lanes];
#pragma GCC unroll 16
        for (int n = 0; n < lanes; ++n) rows[n] = load(key[n] + d);
        swap_blocks<T, 1>(rows);
#pragma GCC unroll 16
        for (int n = 0; n < lanes; ++n) store(to + (d + n) * kTile + j, rows[n]);
      }
    }
#endif
    for (; d < size; ++d) {
      for (int n = 0; n < lanes; ++n) to[d * kTile + j + n] = key[n][d];
    }
  }
}

// Softmax weights of one query in a tile, in place of its scores; returns what earlier sums are multiplied by.
template <typename T>
SHIPS_ALWAYS_INLINE T weigh(T* scores, int64_t begin, int64_t end, int64_t padded, T softcap, T* largest, T* sum) {
  if (begin >= end) {
    std::fill(scores, scores + padded, T(0));
    return T(1);
  }
  cap(scores, begin, end, softcap);
  const T top = largest_of(scores, begin, end, *largest);
#pragma omp simd
  for (int64_t j = 0; j < padded; ++j) scores[j] = exp_of(scores[j] - top);
  std::fill(scores, scores + begin, T(0));
  std::fill(scores + end, scores + padded, T(0));
  T total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < padded; ++j) total += scores[j];
  const T before = exp_of(*largest - top);
  *largest = top;
  *sum = *sum * before + total;
  return before;
}

template <typename T, bool Wide>
SHIPS_ALWAYS_INLINE void run_block(const Call<T>& call, int64_t row, int64_t kv_head, int64_t block, Scratch<T>& work) {
  constexpr int64_t pair = 2 * Lanes<T>::count;
  const Shape& shape = call.shape;
  const int64_t shared = shape.heads / shape.kv_heads, first_head = kv_head * shared;
  const int32_t* range = call.blocks + 4 * block;
  const int64_t queries = range[1] - range[0], num_keys = range[3] - range[2];
  const int64_t groups = (queries + kQueries - 1) / kQueries;
  const int32_t* table = call.query_table + 3 * range[0];
  const int32_t* keys = call.keys + range[2];
  const int64_t size = work.size, width = work.width;
  const Masks<T>& masks = call.masks;
  const auto flags = [&](int64_t h) { return masks.flags(row * shape.heads + first_head + h); };
  const auto factor = [&](int64_t h) { return masks.output_scale[row * shape.heads + first_head + h]; };
  // Heads that are off, or replaced, need no attention.
  const auto skipped = [&](int64_t h) { return factor(h) == 0 || (flags(h) & kReplaceOut); };

  bool any = false, any_own = false, any_alt = false;
  for (int64_t h = 0; h < shared; ++h) {
    if (skipped(h)) continue;
    any = true;
    ((flags(h) & kReplaceK) ? any_alt : any_own) = true;
    const T scale = T(masks.scaling * masks.logit_scale[row * shape.heads + first_head + h]);
    for (int64_t g = 0; g < groups; ++g) {
      T* to = work.q.data() + (h * groups + g) * size * kQueries;
      for (int64_t i = 0; i < kQueries; ++i) {
        const int64_t n = std::min(g * kQueries + i, queries - 1);
        const int64_t at = table[3 * n];
        const T* q = (flags(h) & kReplaceQ) ? call.q_alt.at(row, at, 0) : call.q.at(row, at, first_head + h);
        scale_into(to + i * size, q, size, scale);
      }
    }
  }
  if (any) {
    const int64_t padded_queries = groups * kQueries;
    std::fill(work.out.begin(), work.out.begin() + shared * padded_queries * width, T(0));
    for (int64_t h = 0; h < shared; ++h) {  // a sink is seen by every query before the first key
      const T sink = masks.sink_of(first_head + h);
      std::fill_n(work.sum.begin() + h * padded_queries, padded_queries, sink == -std::numeric_limits<T>::infinity() ? T(0) : T(1));
      std::fill_n(work.largest.begin() + h * padded_queries, padded_queries, sink);
    }
  }
  for (int64_t start = 0; any && start < num_keys; start += kTile) {
    const int64_t count = std::min<int64_t>(kTile, num_keys - start);
    const int64_t padded = (count + pair - 1) / pair * pair;
    if (any_own) transpose<T, Wide>(work.keys.data(), size, count, work.zeros.data(), [&](int64_t j) { return call.k.at(row, keys[start + j], kv_head); });
    if (any_alt) transpose<T, Wide>(work.alt.data(), size, count, work.zeros.data(), [&](int64_t j) { return call.k_alt.at(row, keys[start + j], 0); });
    for (int64_t j = 0; j < count; ++j) {
      const T* value = call.v.at(row, keys[start + j], kv_head);
      T* to = work.values.data() + j * width;
      for (int64_t d = 0; d < shape.out_size; ++d) to[d] = value[d];
      for (int64_t d = shape.out_size; d < width; ++d) to[d] = 0;
    }
    for (int64_t h = 0; h < shared; ++h) {
      if (skipped(h)) continue;
      const T* tile = (flags(h) & kReplaceK) ? work.alt.data() : work.keys.data();
      for (int64_t g = 0; g < groups; ++g) {
        int64_t begin[kQueries], end[kQueries], low = count, high = 0;
        for (int64_t i = 0; i < kQueries; ++i) {
          const int64_t n = std::min(g * kQueries + i, queries - 1);
          begin[i] = std::clamp<int64_t>(table[3 * n + 1] - start, 0, count);
          end[i] = std::clamp<int64_t>(table[3 * n + 2] - start, 0, count);
          if (begin[i] < end[i]) {
            low = std::min(low, begin[i]);
            high = std::max(high, end[i]);
          }
        }
        if (low >= high) continue;
        const T* q = work.q.data() + (h * groups + g) * size * kQueries;
        T* scores = work.scores.data();
        std::fill(scores, scores + kQueries * kTile, T(0));
        for (int64_t j = 0; j < padded; j += pair) {
          multiply_add<T>(q, 1, size, tile + j, kTile, 0, size, scores + j, kTile);
        }
        T* out = work.out.data() + (h * groups + g) * kQueries * width;
        for (int64_t i = 0; i < kQueries; ++i) {
          const int64_t n = (h * groups + g) * kQueries + i;
          const T before = weigh<T>(scores + i * kTile, begin[i], end[i], padded, masks.softcap, &work.largest[n], &work.sum[n]);
          if (before != 1) {
            for (int64_t d = 0; d < width; ++d) out[i * width + d] *= before;
          }
        }
        for (int64_t d = 0; d < width; d += pair) {
          multiply_add<T>(scores, 1, kTile, work.values.data() + d, width, low, high, out + d, width);
        }
      }
    }
  }
  for (int64_t h = 0; h < shared; ++h) {
    for (int64_t n = 0; n < queries; ++n) {
      const int64_t at = table[3 * n];
      T* to = call.out + ((row * shape.queries + at) * shape.heads + first_head + h) * shape.out_size;
      const T scale = T(factor(h));
      if (scale == 0) {
        std::fill(to, to + shape.out_size, T(0));
      } else if (flags(h) & kReplaceOut) {
        scale_into(to, call.out_alt.at(0, at, first_head + h), shape.out_size, scale);
      } else {
        const int64_t place = h * groups * kQueries + n;
        const T* from = work.out.data() + place * width;
        const T share = T(1) / work.sum[place];
        for (int64_t d = 0; d < shape.out_size; ++d) to[d] = from[d] * share * scale;
      }
    }
  }
}

template <typename T, bool Wide>
SHIPS_ALWAYS_INLINE void run_tasks(const Call<T>& call, int64_t begin, int64_t end, Scratch<T>& work) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task % call.num_blocks, rest = task / call.num_blocks;
    run_block<T, Wide>(call, rest / call.shape.kv_heads, rest % call.shape.kv_heads, block, work);
  }
}

template <typename T>
void run(const Tensor& q, const Tensor& k, const Tensor& v, const MaskTensors& masks, const Tensor& blocks,
         const Tensor& queries, const Tensor& keys, Tensor& out) {
  const Call<T> call{
      {out.size(0), out.size(2), k.size(1), out.size(1), q.size(3), out.size(3)},
      view<T>(q, {0, 2, 1}), view<T>(k, {0, 2, 1}), view<T>(v, {0, 2, 1}),
      view<T>(masks.q_alt, {0, 1, -1}), view<T>(masks.k_alt, {0, 1, -1}), view<T>(masks.out_alt, {-1, 1, 0}),
      Masks<T>(masks), static_cast<const int32_t*>(blocks.const_data_ptr()),
      static_cast<const int32_t*>(queries.const_data_ptr()), static_cast<const int32_t*>(keys.const_data_ptr()),
      blocks.size(0), static_cast<T*>(out.mutable_data_ptr()),
  };
  int64_t most = 1;
  for (int64_t g = 0; g < call.num_blocks; ++g) most = std::max<int64_t>(most, call.blocks[4 * g + 1] - call.blocks[4 * g]);
  const auto go = variant<&run_tasks<T, false>, &run_tasks<T, true>>();
  torch::stable::parallel_for(0, call.shape.rows * call.shape.kv_heads * call.num_blocks, 1,
                              [&](int64_t begin, int64_t end) {
                                Scratch<T> work(call.shape, most);
                                go(call, begin, end, work);
                              });
}

bool table(const Tensor& tensor, int64_t dims, int64_t columns) {
  return tensor.scalar_type() == ScalarType::Int && tensor.is_contiguous() && tensor.dim() == dims &&
         (dims == 1 || tensor.size(1) == columns);
}

void tree_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& logit_scale,
                    const Tensor& output_scale, const Tensor& replace, const Tensor& q_alt, const Tensor& k_alt,
                    const Tensor& out_alt, const Tensor& blocks, const Tensor& queries, const Tensor& keys,
                    const Tensor& sink, double scaling, double softcap, Tensor out) {
  const MaskTensors masks{logit_scale, output_scale, replace, q_alt, k_alt, out_alt, sink, scaling, softcap};
  const auto require = [](bool condition, const char* expected) {
    shipsfast::require("tree_attention", condition, expected);
  };
  require(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && out.dim() == 4 && out.is_contiguous(),
          "q, k and v [B, heads, T, D], and a contiguous out [B, TQ, H, D of v]");
  const ScalarType type = q.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::Double, "float32 or float64");
  const int64_t rows = out.size(0), heads = out.size(2), kv_heads = k.size(1);
  require(q.size(1) == heads && q.size(2) == out.size(1) && k.size(3) == q.size(3) && v.size(3) == out.size(3) &&
              v.size(1) == kv_heads && v.size(2) == k.size(2) && kv_heads > 0 && heads % kv_heads == 0,
          "shapes of q, k, v and out that fit together");
  for (const Tensor* x : {&q, &k, &v}) {
    require(x->scalar_type() == type && contiguous_last(*x) && (x->size(0) == rows || x->size(0) == 1),
            "one dtype, contiguous heads, and as many rows as out or one");
  }
  require(out.scalar_type() == type, "out of the dtype of q");
  check_masks("tree_attention", masks, type, rows, heads);
  for (const Tensor* x : {&q_alt, &k_alt, &out_alt}) {
    require(x->numel() == 0 || x->dim() == 3, "replacement vectors of three dimensions");
  }
  const auto fits = [](const Tensor& x, int64_t first, int64_t second, int64_t third) {
    return x.numel() == 0 || ((x.size(0) == first || x.size(0) == 1) && x.size(1) == second && x.size(2) == third);
  };
  require(fits(q_alt, rows, out.size(1), q.size(3)) && fits(k_alt, rows, k.size(2), k.size(3)) &&
              (fits(out_alt, heads, out.size(1), v.size(3)) || fits(out_alt, heads, 1, v.size(3))),
          "q_alt [B or 1, TQ, D], k_alt [B or 1, T, D] and out_alt [H or 1, TQ or 1, D of v]");
  require(table(blocks, 2, 4) && table(queries, 2, 3) && table(keys, 1, 0), "the tables of cpp_attention.plan_blocks");
  if (out.numel() == 0) return;
  const auto go = type == ScalarType::Float ? &run<float> : &run<double>;
  go(q, k, v, masks, blocks, queries, keys, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(shipsfast, m) {
  m.def(
      "tree_attention(Tensor q, Tensor k, Tensor v, Tensor logit_scale, Tensor output_scale, Tensor replace, "
      "Tensor q_alt, Tensor k_alt, Tensor out_alt, Tensor blocks, Tensor queries, Tensor keys, Tensor sink, float scaling, "
      "float softcap, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shipsfast, CPU, m) { m.impl("tree_attention", TORCH_BOX(&tree_attention)); }
