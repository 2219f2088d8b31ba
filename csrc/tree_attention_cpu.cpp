// Attention over a packed prefix tree with per-head mask vectors, on the CPU.
//
//   tree_attention(q, k, v, logit_scale, output_scale, replace, q_alt, k_alt, out_alt, blocks, queries, keys,
//                  sink, scaling, softcap, out)
//
// The arithmetic is that of shipsfast/ops/reference.py. The tree comes as blocks: some queries, and the keys of the path
// they lie on in ascending depth, of which each query sees a contiguous range (shipsfast/ops/tree_attention_cpp.py cuts it).
// One task is one block of one row and key/value head. It goes through its keys in tiles, each tile once for all
// query heads that share it (ships_tiles.h). No result depends on how tasks are spread over threads.

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

struct Shape {
  int64_t rows, heads, kv_heads, queries, size, out_size;
};

// T: what sums are made in; S: how tensors are stored.
template <typename T, typename S>
struct Call {
  Shape shape;
  View<S> q, k, v;              // [B, T, heads, D]
  View<S> q_alt, k_alt;         // [B, T, -, D]
  View<S> out_alt;              // [-, T, H, D]
  Masks<T> masks;
  const int32_t* blocks;        // [G, 4]: first and one past the last of queries, of keys
  const int32_t* query_table;   // [NQ, 3]: index into q, and which of the block's keys it sees: first, one past the last
  const int32_t* keys;          // [NK]: index into k and v
  int64_t num_blocks;
  S* out;                       // [B, TQ, H, D of v]
};

// What one thread works in.
template <typename T>
struct Scratch {
  Tile<T> tile;
  std::vector<T> q;              // [query heads, queries, D], scaled
  std::vector<T> out;            // [query heads, queries, width]
  std::vector<T> largest, sum;   // [query heads, queries]

  explicit Scratch(const Shape& shape, int64_t most_queries) : tile(shape.size, shape.out_size) {
    const int64_t queries = shape.heads / shape.kv_heads * round_up(most_queries, kQueries);
    q.resize(queries * tile.size);
    out.resize(queries * tile.width);
    largest.resize(queries);
    sum.resize(queries);
  }
};

template <typename T, typename S, bool Registers>
SHIPS_ALWAYS_INLINE void run_block(const Call<T, S>& call, int64_t row, int64_t kv_head, int64_t block, Scratch<T>& work) {
  const Shape& shape = call.shape;
  const int64_t shared = shape.heads / shape.kv_heads, first_head = kv_head * shared;
  const int32_t* range = call.blocks + 4 * block;
  const int64_t queries = range[1] - range[0], num_keys = range[3] - range[2];
  const int64_t groups = (queries + kQueries - 1) / kQueries;
  const int32_t* table = call.query_table + 3 * range[0];
  const int32_t* keys = call.keys + range[2];
  Tile<T>& tile = work.tile;
  const int64_t size = tile.size, width = tile.width;
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
        const S* q = (flags(h) & kReplaceQ) ? call.q_alt.at(row, at, 0) : call.q.at(row, at, first_head + h);
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
    if (any_own) transpose<T, S, Registers>(tile.keys.data(), size, count, tile.template zeros_of<S>(), [&](int64_t j) { return call.k.at(row, keys[start + j], kv_head); });
    if (any_alt) transpose<T, S, Registers>(tile.alt.data(), size, count, tile.template zeros_of<S>(), [&](int64_t j) { return call.k_alt.at(row, keys[start + j], 0); });
    load_values(tile, shape.out_size, count, [&](int64_t j) { return call.v.at(row, keys[start + j], kv_head); });
    for (int64_t h = 0; h < shared; ++h) {
      if (skipped(h)) continue;
      const T* seen = (flags(h) & kReplaceK) ? tile.alt.data() : tile.keys.data();
      for (int64_t g = 0; g < groups; ++g) {
        int64_t begin[kQueries], end[kQueries];
        for (int64_t i = 0; i < kQueries; ++i) {
          const int64_t n = std::min(g * kQueries + i, queries - 1);
          begin[i] = std::clamp<int64_t>(table[3 * n + 1] - start, 0, count);
          end[i] = std::clamp<int64_t>(table[3 * n + 2] - start, 0, count);
        }
        const int64_t first = (h * groups + g) * kQueries;
        attend<T>(tile, seen, count, work.q.data() + first * size, begin, end, masks.softcap,
                  work.out.data() + first * width, &work.largest[first], &work.sum[first]);
      }
    }
  }
  for (int64_t h = 0; h < shared; ++h) {
    for (int64_t n = 0; n < queries; ++n) {
      const int64_t at = table[3 * n];
      S* to = call.out + ((row * shape.queries + at) * shape.heads + first_head + h) * shape.out_size;
      const T scale = T(factor(h));
      if (scale == 0) {
        clear(to, shape.out_size);
      } else if (flags(h) & kReplaceOut) {
        scale_into(to, call.out_alt.at(0, at, first_head + h), shape.out_size, scale);
      } else {
        const int64_t place = h * groups * kQueries + n;
        const T* from = work.out.data() + place * width;
        const T share = T(1) / work.sum[place];
        for (int64_t d = 0; d < shape.out_size; ++d) round_to(to[d], from[d] * share * scale);
      }
    }
  }
}

template <typename T, typename S, bool Registers>
SHIPS_ALWAYS_INLINE void run_tasks(const Call<T, S>& call, int64_t begin, int64_t end, Scratch<T>& work) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task % call.num_blocks, rest = task / call.num_blocks;
    run_block<T, S, Registers>(call, rest / call.shape.kv_heads, rest % call.shape.kv_heads, block, work);
  }
}

template <typename S>
void run(const Tensor& q, const Tensor& k, const Tensor& v, const MaskTensors& masks, const Tensor& blocks,
         const Tensor& queries, const Tensor& keys, Tensor& out) {
  using T = Wide<S>;
  const Call<T, S> call{
      {out.size(0), out.size(2), k.size(1), out.size(1), q.size(3), out.size(3)},
      view<S>(q, {0, 2, 1}), view<S>(k, {0, 2, 1}), view<S>(v, {0, 2, 1}),
      view<S>(masks.q_alt, {0, 1, -1}), view<S>(masks.k_alt, {0, 1, -1}), view<S>(masks.out_alt, {-1, 1, 0}),
      Masks<T>(masks), static_cast<const int32_t*>(blocks.const_data_ptr()),
      static_cast<const int32_t*>(queries.const_data_ptr()), static_cast<const int32_t*>(keys.const_data_ptr()),
      blocks.size(0), static_cast<S*>(out.mutable_data_ptr()),
  };
  int64_t most = 1;
  for (int64_t g = 0; g < call.num_blocks; ++g) most = std::max<int64_t>(most, call.blocks[4 * g + 1] - call.blocks[4 * g]);
  const auto go = variant<&run_tasks<T, S, false>, &run_tasks<T, S, true>>();
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
  require(is_storage(type), kStorage);
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
  with_storage(type, [&](auto zero) { run<decltype(zero)>(q, k, v, masks, blocks, queries, keys, out); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(shipsfast, m) {
  m.def(
      "tree_attention(Tensor q, Tensor k, Tensor v, Tensor logit_scale, Tensor output_scale, Tensor replace, "
      "Tensor q_alt, Tensor k_alt, Tensor out_alt, Tensor blocks, Tensor queries, Tensor keys, Tensor sink, float scaling, "
      "float softcap, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shipsfast, CPU, m) { m.impl("tree_attention", TORCH_BOX(&tree_attention)); }
