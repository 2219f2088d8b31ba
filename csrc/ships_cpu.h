// What the CPU kernels over rows of logits share: logit types, instruction sets, the order and threads of rows.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "ships_half.h"
#include "ships_kl.h"
#include "ships_math.h"

// Where the compiler can, each loop over the vocabulary is built for three instruction sets and chosen when
// run, so that one build runs on any x86-64. Elsewhere the default build is it (aarch64 always has NEON).
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define SHIPS_X86_VARIANTS 1
#define SHIPS_TARGET_AVX2 __attribute__((target("avx2,fma")))
#if defined(__clang__)
#define SHIPS_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#else
#define SHIPS_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")))
#endif
#else
#define SHIPS_X86_VARIANTS 0
#endif

namespace shipsfast {
namespace {

constexpr int64_t kBlock = 2048;                // elements per partial sum: bounds the rounding of long rows
constexpr int64_t kElementsPerTask = 1 << 15;   // less than this is not worth another thread
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

template <typename S>
SHIPS_INLINE double to_f64(S x) {
  return widened(x);
}

// The largest logit, leaving NaN out: whatever a NaN is in, it reaches the sums.
template <typename T>
SHIPS_INLINE double row_max_body(const T* x, int64_t vocab) {
  double largest = -kInfinity;
#pragma omp simd reduction(max : largest)
  for (int64_t v = 0; v < vocab; ++v) {
    const double value = to_f64(x[v]);
    largest = value > largest ? value : largest;
  }
  return largest;
}

enum class Isa { kDefault, kAvx2, kAvx512 };

// The widest instruction set this machine has. SHIPSFAST_CPU_ISA = default | avx2 | avx512 asks for less:
// the tests use it to reach every variant.
Isa choose_isa() {
  Isa best = Isa::kDefault;
#if SHIPS_X86_VARIANTS
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    best = Isa::kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      best = Isa::kAvx512;
    }
  }
#endif
  const char* requested = std::getenv("SHIPSFAST_CPU_ISA");
  if (requested == nullptr) return best;
  const std::string name(requested);
  const Isa isa = name == "avx512" ? Isa::kAvx512 : name == "avx2" ? Isa::kAvx2 : Isa::kDefault;
  if ((isa == Isa::kDefault && name != "default") || isa > best) {
    throw std::runtime_error("SHIPSFAST_CPU_ISA=" + name + " is unknown, or this machine or build lacks it; "
                             "unset it, or use default, avx2 or avx512");
  }
  return isa;
}

// body(args...), built for each instruction set; wide_body where vectors of 64 bytes are registers. Both must be
// inlined: only then are they compiled anew.
template <auto body, auto wide_body, typename = decltype(body)>
struct Variants;
template <auto body, auto wide_body, typename R, typename... Args>
struct Variants<body, wide_body, R (*)(Args...)> {
  static R basic(Args... args) { return body(args...); }
#if SHIPS_X86_VARIANTS
  SHIPS_TARGET_AVX2 static R avx2(Args... args) { return body(args...); }
  SHIPS_TARGET_AVX512 static R avx512(Args... args) { return wide_body(args...); }
#endif
};

// The one for this machine.
template <auto body, auto wide_body = body>
decltype(body) variant() {
  using All = Variants<body, wide_body>;
  [[maybe_unused]] const Isa isa = choose_isa();
#if SHIPS_X86_VARIANTS
  if (isa == Isa::kAvx512) return &All::avx512;
  if (isa == Isa::kAvx2) return &All::avx2;
#endif
  return &All::basic;
}

// The ablated rows in the order of their base rows, so that each base row is prepared once per thread.
std::vector<int64_t> group_by_base_row(const LogitRows& rows) {
  std::vector<int64_t> next(rows.num_base + 1, 0);
  for (int64_t i = 0; i < rows.num_ablated; ++i) ++next[rows.row_map[i] + 1];
  std::partial_sum(next.begin(), next.end(), next.begin());
  std::vector<int64_t> order(rows.num_ablated);
  for (int64_t i = 0; i < rows.num_ablated; ++i) order[next[rows.row_map[i]]++] = i;
  return order;
}

// For each ablated row on some thread: state.load(base row), when it is another than the one before, and then
// state.score(i, ablated row). A row is one thread's work from end to end. make_state() is called per thread.
template <typename T, typename MakeState>
void for_each_row(const LogitRows& rows, MakeState make_state) {
  const std::vector<int64_t> order = group_by_base_row(rows);
  const int64_t rows_per_task = (kElementsPerTask + rows.vocab - 1) / rows.vocab;
  const T* base = static_cast<const T*>(rows.base);
  const T* ablated = static_cast<const T*>(rows.ablated);
  torch::stable::parallel_for(0, rows.num_ablated, rows_per_task, [&](int64_t begin, int64_t end) {
    auto state = make_state();
    int64_t loaded = -1;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i = order[k];
      const int64_t p = rows.row_map[i];
      if (p != loaded) {
        state.load(base + p * rows.base_stride, rows.vocab);
        loaded = p;
      }
      state.score(i, ablated + i * rows.ablated_stride, rows.vocab);
    }
  });
}

}  // namespace
}  // namespace shipsfast
