// Attention of one new token per row over a cache of keys and values, with per-head mask vectors, on the CPU.
//
//   cache_write(new, source, slot, position, cache)
//       cache[slot[m], :, position[m]] = new[source[m]]
//
//   decode_attention(q, k_cache, v_cache, slot, length, logit_scale, output_scale, replace, q_alt, k_alt, out_alt,
//                    sink, scaling, softcap, window, out)
//
// The arithmetic is that of shipsfast/ops/reference.py. One task is one entry and key/value head: the scores of all
// positions it sees lie in one short buffer, softmax is taken of it in place, and values are summed by its weights.
// No result depends on how tasks are spread over threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "ships_attention.h"
#include "ships_cpu.h"
#include "ships_exp.h"

namespace {

using namespace shipsfast;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// T: what sums are made in; S: how tensors are stored.
template <typename T, typename S>
struct Call {
  int64_t entries, heads, kv_heads, size, out_size, capacity, window;
  View<S> q;                    // [N, H, D]
  View<S> k, v;                 // [S, HKV, C, D]
  View<S> q_alt;                // [N or 1, D]
  View<S> k_alt;                // [S, C, D]
  View<S> out_alt;              // [H or 1, D of v]
  const int32_t* slot;          // [N]
  const int32_t* length;        // [N]
  Masks<T> masks;
  S* out;                       // [N, H, D of v]
};

// scores[j] = q . key(j), for `count` keys of `size` numbers that lie `stride` apart.
template <typename T, typename S>
SHIPS_ALWAYS_INLINE void score(const T* q, const S* keys, int64_t stride, int64_t count, int64_t size, T* scores) {
  for (int64_t j = 0; j < count; ++j) {
    const S* key = keys + j * stride;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < size; ++d) sum += q[d] * widened(key[d]);
    scores[j] = sum;
  }
}

// Scores become softmax weights that are not yet divided by their sum, which is returned. sink: -inf for none.
template <typename T>
SHIPS_ALWAYS_INLINE T weigh(T* scores, int64_t count, T softcap, T sink) {
  cap(scores, 0, count, softcap);
  const T top = largest_of(scores, 0, count, sink);
  T total = sink == -std::numeric_limits<T>::infinity() ? T(0) : exp_of(sink - top);
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < count; ++j) {
    scores[j] = exp_of(scores[j] - top);
    total += scores[j];
  }
  return total;
}

constexpr int64_t kChunk = 64;  // numbers of an output that are summed at a time, in registers

// size: at most kChunk; a constant where it is that, for sums in registers.
template <typename T, typename S, typename Size>
SHIPS_ALWAYS_INLINE void add_chunk(const T* weights, const S* values, int64_t stride, int64_t count, Size size,
                                   T factor, S* out) {
  T sum[kChunk] = {};
  for (int64_t j = 0; j < count; ++j) {
    const S* value = values + j * stride;
    const T weight = weights[j];
#pragma omp simd
    for (int64_t d = 0; d < size; ++d) sum[d] += weight * widened(value[d]);
  }
  for (int64_t d = 0; d < size; ++d) round_to(out[d], sum[d] * factor);
}

template <typename T, typename S>
SHIPS_ALWAYS_INLINE void add_values(const T* weights, const S* values, int64_t stride, int64_t count, int64_t size,
                                    T factor, S* out) {
  constexpr std::integral_constant<int64_t, kChunk> whole;
  int64_t start = 0;
  for (; start + kChunk <= size; start += kChunk) {
    add_chunk(weights, values + start, stride, count, whole, factor, out + start);
  }
  if (start < size) add_chunk(weights, values + start, stride, count, size - start, factor, out + start);
}

template <typename T, typename S>
SHIPS_ALWAYS_INLINE void run_tasks(const Call<T, S>& call, int64_t begin, int64_t end) {
  const Masks<T>& masks = call.masks;
  const int64_t shared = call.heads / call.kv_heads;
  std::vector<T> scores(call.capacity), query(call.size);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / call.kv_heads, kv_head = task % call.kv_heads;
    const int64_t slot = call.slot[n], stop = call.length[n];
    const int64_t start = call.window > 0 ? std::max<int64_t>(0, stop - call.window) : 0;
    const int64_t count = stop - start;
    for (int64_t h = kv_head * shared; h < (kv_head + 1) * shared; ++h) {
      const int64_t at = n * call.heads + h;
      const int8_t flags = masks.flags(at);
      const T factor = T(masks.output_scale[at]);
      S* out = call.out + at * call.out_size;
      if (factor == 0) {
        clear(out, call.out_size);
        continue;
      }
      if (flags & kReplaceOut) {
        scale_into(out, call.out_alt.at(h, 0, 0), call.out_size, factor);
        continue;
      }
      const S* q = (flags & kReplaceQ) ? call.q_alt.at(n, 0, 0) : call.q.at(n, h, 0);
      scale_into(query.data(), q, call.size, T(masks.scaling * masks.logit_scale[at]));
      const bool other = flags & kReplaceK;
      const S* keys = other ? call.k_alt.at(slot, start, 0) : call.k.at(slot, kv_head, start);
      score(query.data(), keys, other ? call.k_alt.strides[1] : call.k.strides[2], count, call.size, scores.data());
      const T total = weigh(scores.data(), count, masks.softcap, masks.sink_of(h));
      add_values(scores.data(), call.v.at(slot, kv_head, start), call.v.strides[2], count, call.out_size,
                 factor / total, out);
    }
  }
}

template <typename S>
void run(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& slot, const Tensor& length,
         const MaskTensors& masks, int64_t window, Tensor& out) {
  using T = Wide<S>;
  const Call<T, S> call{
      out.size(0), out.size(1), k.size(1), q.size(2), out.size(2), k.size(2), window,
      view<S>(q, {0, 1, -1}), view<S>(k, {0, 1, 2}), view<S>(v, {0, 1, 2}),
      view<S>(masks.q_alt, {0, -1, -1}), view<S>(masks.k_alt, {0, 1, -1}), view<S>(masks.out_alt, {0, -1, -1}),
      static_cast<const int32_t*>(slot.const_data_ptr()), static_cast<const int32_t*>(length.const_data_ptr()),
      Masks<T>(masks), static_cast<S*>(out.mutable_data_ptr()),
  };
  for (int64_t n = 0; n < call.entries; ++n) {
    require("decode_attention", call.slot[n] >= 0 && call.slot[n] < k.size(0), "slots of the cache");
    require("decode_attention", call.length[n] >= 1 && call.length[n] <= call.capacity, "lengths from 1 to the cache's capacity");
  }
  const auto go = variant<&run_tasks<T, S>>();
  torch::stable::parallel_for(0, call.entries * call.kv_heads, 1, [&](int64_t begin, int64_t end) { go(call, begin, end); });
}

void decode_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& slot, const Tensor& length,
                      const Tensor& logit_scale, const Tensor& output_scale, const Tensor& replace, const Tensor& q_alt,
                      const Tensor& k_alt, const Tensor& out_alt, const Tensor& sink, double scaling, double softcap,
                      int64_t window, Tensor out) {
  const MaskTensors masks{logit_scale, output_scale, replace, q_alt, k_alt, out_alt, sink, scaling, softcap};
  const auto check = [](bool condition, const char* expected) { require("decode_attention", condition, expected); };
  check(q.dim() == 3 && k.dim() == 4 && v.dim() == 4 && out.dim() == 3 && out.is_contiguous(),
        "q [N, H, D], caches [S, HKV, C, D], and a contiguous out [N, H, D of v]");
  const ScalarType type = q.scalar_type();
  check(is_storage(type), kStorage);
  const int64_t entries = q.size(0), heads = q.size(1), kv_heads = k.size(1);
  check(out.size(0) == entries && out.size(1) == heads && out.size(2) == v.size(3) && k.size(3) == q.size(2) &&
            v.size(0) == k.size(0) && v.size(1) == kv_heads && v.size(2) == k.size(2) && kv_heads > 0 &&
            heads % kv_heads == 0,
        "shapes of q, caches and out that fit together");
  for (const Tensor* x : {&q, &k, &v}) check(x->scalar_type() == type && contiguous_last(*x), "one dtype, contiguous heads");
  check(out.scalar_type() == type, "out of the dtype of q");
  for (const Tensor* x : {&slot, &length}) {
    check(x->scalar_type() == ScalarType::Int && x->is_contiguous() && x->numel() == entries, "int32 slot and length [N]");
  }
  check_masks("decode_attention", masks, type, entries, heads);
  check(q_alt.numel() == 0 || (q_alt.dim() == 2 && (q_alt.size(0) == entries || q_alt.size(0) == 1) && q_alt.size(1) == q.size(2)),
        "q_alt [N or 1, D]");
  check(k_alt.numel() == 0 || (k_alt.dim() == 3 && k_alt.size(0) == k.size(0) && k_alt.size(1) == k.size(2) && k_alt.size(2) == q.size(2)),
        "k_alt [S, C, D]");
  check(out_alt.numel() == 0 || (out_alt.dim() == 2 && (out_alt.size(0) == heads || out_alt.size(0) == 1) && out_alt.size(1) == v.size(3)),
        "out_alt [H or 1, D of v]");
  if (out.numel() == 0) return;
  with_storage(type, [&](auto zero) { run<decltype(zero)>(q, k, v, slot, length, masks, window, out); });
}

void cache_write(const Tensor& fresh, const Tensor& source, const Tensor& slot, const Tensor& position, Tensor cache) {
  const auto check = [](bool condition, const char* expected) { require("cache_write", condition, expected); };
  check(fresh.dim() == 3 && cache.dim() == 4 && cache.is_contiguous() && contiguous_last(fresh) &&
            fresh.size(1) == cache.size(1) && fresh.size(2) == cache.size(3),
        "new [n, HKV, D] and a contiguous cache [S, HKV, C, D]");
  check(fresh.scalar_type() == cache.scalar_type() && fresh.element_size() == cache.element_size(), "one dtype");
  const int64_t count = slot.numel();
  for (const Tensor* x : {&source, &slot, &position}) {
    check(x->scalar_type() == ScalarType::Long && x->is_contiguous() && x->numel() == count, "int64 source, slot and position [M]");
  }
  const int64_t heads = cache.size(1), capacity = cache.size(2), size = cache.size(3) * cache.element_size();
  const auto* from = static_cast<const int64_t*>(source.const_data_ptr());
  const auto* to_slot = static_cast<const int64_t*>(slot.const_data_ptr());
  const auto* to_position = static_cast<const int64_t*>(position.const_data_ptr());
  for (int64_t m = 0; m < count; ++m) {
    check(from[m] >= 0 && from[m] < fresh.size(0) && to_slot[m] >= 0 && to_slot[m] < cache.size(0) &&
              to_position[m] >= 0 && to_position[m] < capacity,
          "sources among new, and places of the cache");
  }
  const auto* data = static_cast<const char*>(fresh.const_data_ptr());
  auto* room = static_cast<char*>(cache.mutable_data_ptr());
  const int64_t row = fresh.stride(0) * cache.element_size(), head = fresh.stride(1) * cache.element_size();
  constexpr int64_t kRows = 16;  // less is not worth another thread
  torch::stable::parallel_for(0, count, kRows, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      for (int64_t h = 0; h < heads; ++h) {
        std::memcpy(room + ((to_slot[m] * heads + h) * capacity + to_position[m]) * size, data + from[m] * row + h * head, size);
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(shipsfast, m) {
  m.def("cache_write(Tensor fresh, Tensor source, Tensor slot, Tensor position, Tensor(a!) cache) -> ()");
  m.def(
      "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor slot, Tensor length, Tensor logit_scale, "
      "Tensor output_scale, Tensor replace, Tensor q_alt, Tensor k_alt, Tensor out_alt, Tensor sink, float scaling, float softcap, "
      "int window, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shipsfast, CPU, m) {
  m.impl("cache_write", TORCH_BOX(&cache_write));
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
}
