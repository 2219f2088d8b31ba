// Tiles of keys and values that many queries are held against, for attention on CPUs: inner products in registers, and
// a running maximum and sum per query (Milakov & Gimelshein, arXiv 1805.02867), so that nothing of size queries x keys
// exists.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "ships_attention.h"
#include "ships_exp.h"

// Vectors are passed between functions that are always inlined, so their ABI never shows.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace shipsfast {
namespace {

constexpr int kTile = 64;     // keys at a time
constexpr int kQueries = 6;   // queries at a time: with two vectors each, twelve accumulators

constexpr int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

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

template <typename T, typename S>
SHIPS_ALWAYS_INLINE typename Lanes<T>::Vec load_as(const S* from) {
  if constexpr (std::is_same_v<T, S>) {
    return load(from);
  } else {
    T wide[Lanes<T>::count];
    for (int i = 0; i < Lanes<T>::count; ++i) wide[i] = widened(from[i]);
    return load(wide);
  }
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
// Registers: vectors are such, and squares of them are transposed there. zeros: size of them.
template <typename T, typename S, bool Registers, typename From>
SHIPS_ALWAYS_INLINE void transpose(T* to, int64_t size, int64_t count, const S* zeros, const From& from) {
  constexpr int lanes = Lanes<T>::count;
  const int64_t padded = round_up(count, 2 * lanes);
  for (int64_t j = 0; j < padded; j += lanes) {
    const S* key[lanes];
    for (int64_t n = 0; n < lanes; ++n) key[n] = j + n < count ? from(j + n) : zeros;
    int64_t d = 0;
#if !defined(__clang__)
    if constexpr (Registers) {
      for (; d + lanes <= size; d += lanes) {
        typename Lanes<T>::Vec rows[lanes];
#pragma GCC unroll 16
        for (int n = 0; n < lanes; ++n) rows[n] = load_as<T>(key[n] + d);
        swap_blocks<T, 1>(rows);
#pragma GCC unroll 16
        for (int n = 0; n < lanes; ++n) store(to + (d + n) * kTile + j, rows[n]);
      }
    }
#endif
    for (; d < size; ++d) {
      for (int n = 0; n < lanes; ++n) to[d * kTile + j + n] = widened(key[n][d]);
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

// What one thread holds of a tile. Padded with zeros to whole vectors.
template <typename T>
struct Tile {
  int64_t size, width;        // D, and D of v padded to two vectors
  std::vector<unsigned char> zeros;  // those of D numbers
  std::vector<T> keys, alt;   // [D, kTile], the keys and those that replace them
  std::vector<T> values;      // [kTile, width]
  std::vector<T> scores;      // [kQueries, kTile]

  template <typename S>
  const S* zeros_of() const {
    return reinterpret_cast<const S*>(zeros.data());
  }

  Tile(int64_t size, int64_t out_size)
      : size(size), width(round_up(out_size, 2 * Lanes<T>::count)), zeros(size * sizeof(T)), keys(size * kTile), alt(size * kTile),
        values(kTile * width), scores(kQueries * kTile) {}
};

template <typename T, typename From>
SHIPS_ALWAYS_INLINE void load_values(Tile<T>& tile, int64_t out_size, int64_t count, const From& from) {
  for (int64_t j = 0; j < count; ++j) {
    const auto* value = from(j);
    T* to = tile.values.data() + j * tile.width;
    for (int64_t d = 0; d < out_size; ++d) to[d] = widened(value[d]);
    for (int64_t d = out_size; d < tile.width; ++d) to[d] = 0;
  }
}

// kQueries queries [kQueries, D], scaled, against the `count` keys of a tile, of which each sees begin .. end - 1. keys: those
// of the tile, or those that replace them. out: [kQueries, width].
template <typename T>
SHIPS_ALWAYS_INLINE void attend(Tile<T>& tile, const T* keys, int64_t count, const T* q, const int64_t* begin,
                                const int64_t* end, T softcap, T* out, T* largest, T* sum) {
  constexpr int64_t pair = 2 * Lanes<T>::count;
  int64_t low = count, high = 0;
  for (int64_t i = 0; i < kQueries; ++i) {
    if (begin[i] >= end[i]) continue;
    low = std::min(low, begin[i]);
    high = std::max(high, end[i]);
  }
  if (low >= high) return;
  const int64_t padded = round_up(count, pair), size = tile.size, width = tile.width;
  T* scores = tile.scores.data();
  std::fill(scores, scores + kQueries * kTile, T(0));
  for (int64_t j = 0; j < padded; j += pair) {
    multiply_add<T>(q, 1, size, keys + j, kTile, 0, size, scores + j, kTile);
  }
  for (int64_t i = 0; i < kQueries; ++i) {
    const T before = weigh<T>(scores + i * kTile, begin[i], end[i], padded, softcap, largest + i, sum + i);
    if (before != 1) {
      for (int64_t d = 0; d < width; ++d) out[i * width + d] *= before;
    }
  }
  for (int64_t d = 0; d < width; d += pair) {
    multiply_add<T>(scores, 1, kTile, tile.values.data() + d, width, low, high, out + d, width);
  }
}

}  // namespace
}  // namespace shipsfast
