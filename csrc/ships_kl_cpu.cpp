// KL(base || ablated) per row of logits, on the CPU, in float64, with one read of the ablated logits.
//
// With a pivot for each row, z = x_b - max(x_b), t = x_a - x_a[argmax x_b], e_b = exp(z), e_a = exp(t):
//
//     KL = log(sum e_a / sum e_b) - sum e_b (t - z) / sum e_b
//
// so one exp per ablated logit; z and e_b come once per base row. Three things make it exact:
//   * sum e_a >= 1, since the pivot's own term is 1: underflow costs nothing. Should another logit be more
//     than about 690 above the pivot, the row is done again with its true maximum as pivot.
//   * where the sums are close, log(sum e_a / sum e_b) = log1p(sum (e_a - e_b) / sum e_b): errors are
//     then relative to the difference, and equal rows give exactly 0.
//   * a row is one thread's work from end to end, so results do not depend on the number of threads.
// Base logits of -inf have e_b = 0 and weigh nothing. Every other e_b is positive, because its
// exponent is clamped at -708: an ablated -inf there gives t = -inf and KL = +inf, as it should.

#include "ships_kl.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/ops.h>

#if defined(__GNUC__) || defined(__clang__)
#define SHIPS_INLINE static inline __attribute__((always_inline))
#else
#define SHIPS_INLINE static inline
#endif

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
constexpr double kLargestSum = 1e300;           // a sum of exps above this may have met exp_f64's ceiling
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

SHIPS_INLINE float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

SHIPS_INLINE double to_f64(double x) { return x; }
SHIPS_INLINE double to_f64(float x) { return x; }
SHIPS_INLINE double to_f64(BFloat16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }

// In integer steps that vectorise everywhere. The subnormal case subtracts rather than scales, so that it
// also holds with denormals flushed to zero (torch.set_flush_denormal).
SHIPS_INLINE double to_f64(Float16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const float normal = float_from_bits(magnitude + (112u << 23));
  const float subnormal = float_from_bits(magnitude + (113u << 23)) - 0x1p-14f;
  const float special = float_from_bits(magnitude | 0x7f800000u);
  const float small = magnitude < (1u << 23) ? subnormal : normal;
  const float value = magnitude >= (31u << 23) ? special : small;
  return (x.bits & 0x8000u) ? -value : value;
}

// Into the range of exp_f64. Comparisons with NaN are false: NaN passes.
SHIPS_INLINE double clamp_exponent(double x) {
  x = x < -708.0 ? -708.0 : x;
  return x > 709.0 ? 709.0 : x;
}

// exp for x in [-708, 709], to about 1 ulp; NaN -> NaN.
// x = n ln2 + r with |r| <= ln2/2 (Cody and Waite: n * ln2_hi is exact), exp(r) = 1 + r + r^2 q(r), with q
// of degree 9 interpolated at Chebyshev nodes (1.6e-17). No branch and no call, so that loops vectorise.
SHIPS_INLINE double exp_f64(double x) {
  constexpr double kLog2E = 0x1.71547652b82fep+0;
  constexpr double kLn2Hi = 0x1.62e42fefa38p-1;
  constexpr double kLn2Lo = 0x1.ef35793c7673p-45;
  constexpr double kRound = 0x1.8p52;  // adding it leaves the nearest integer in the low mantissa bits
  const double rounded = x * kLog2E + kRound;
  const double n = rounded - kRound;
  const double r = (x - n * kLn2Hi) - n * kLn2Lo;
  const double r2 = r * r;
  const double r4 = r2 * r2;
  const double q01 = 0.5 + r * 0x1.5555555555556p-3;
  const double q23 = 0x1.5555555553d68p-5 + r * 0x1.11111111109b5p-7;
  const double q45 = 0x1.6c16c17889f3cp-10 + r * 0x1.a01a01a7c2f2cp-13;
  const double q67 = 0x1.a019b914881bap-16 + r * 0x1.71de0db2eb873p-19;
  const double q89 = 0x1.28917c9f3a495p-22 + r * 0x1.af389eea54156p-26;
  const double q = (q01 + r2 * q23) + r4 * ((q45 + r2 * q67) + r4 * q89);
  uint64_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  bits = (bits << 52) + (uint64_t{1023} << 52);  // 2^n
  double scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return scale + scale * (r + r2 * q);
}

struct RowSums {
  double exps;        // sum e_a
  double difference;  // sum (e_a - e_b)
  double weighted;    // sum e_b (t - z)
};

template <typename T>
SHIPS_INLINE RowSums row_sums_body(const T* x, const double* e_b, const double* z, int64_t vocab, double pivot) {
  RowSums sums{0.0, 0.0, 0.0};
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t end = begin + kBlock < vocab ? begin + kBlock : vocab;
    double exps = 0.0, difference = 0.0, weighted = 0.0;
#pragma omp simd reduction(+ : exps, difference, weighted)
    for (int64_t v = begin; v < end; ++v) {
      const double t = to_f64(x[v]) - pivot;
      const double e_a = exp_f64(clamp_exponent(t));
      const double term = e_b[v] * (t - z[v]);
      exps += e_a;
      difference += e_a - e_b[v];
      weighted += e_b[v] > 0.0 ? term : 0.0;
    }
    sums.exps += exps;
    sums.difference += difference;
    sums.weighted += weighted;
  }
  return sums;
}

// z and e_b of one base row; returns sum e_b.
template <typename T>
SHIPS_INLINE double base_row_body(const T* x, double* e_b, double* z, int64_t vocab, double pivot) {
  double total = 0.0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t end = begin + kBlock < vocab ? begin + kBlock : vocab;
    double exps = 0.0;
#pragma omp simd
    for (int64_t v = begin; v < end; ++v) {
      const double d = to_f64(x[v]) - pivot;
      z[v] = d;
      e_b[v] = clamp_exponent(d);
    }
    // In a loop of its own: GCC would merge this comparison with the clamp's into branches, and not vectorise.
#pragma omp simd reduction(+ : exps)
    for (int64_t v = begin; v < end; ++v) {
      const double e = exp_f64(e_b[v]);
      e_b[v] = z[v] == -kInfinity ? 0.0 : e;
      exps += e_b[v];
    }
    total += exps;
  }
  return total;
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

template <typename T>
struct RowFunctions {
  RowSums (*row_sums)(const T*, const double*, const double*, int64_t, double);
  double (*base_row)(const T*, double*, double*, int64_t, double);
  double (*row_max)(const T*, int64_t);
};

#define SHIPS_DEFINE_VARIANT(NAME, TARGET)                                                                    \
  template <typename T>                                                                                       \
  TARGET RowSums row_sums_##NAME(const T* x, const double* e_b, const double* z, int64_t vocab, double pivot) { \
    return row_sums_body(x, e_b, z, vocab, pivot);                                                            \
  }                                                                                                           \
  template <typename T>                                                                                       \
  TARGET double base_row_##NAME(const T* x, double* e_b, double* z, int64_t vocab, double pivot) {            \
    return base_row_body(x, e_b, z, vocab, pivot);                                                            \
  }                                                                                                           \
  template <typename T>                                                                                       \
  TARGET double row_max_##NAME(const T* x, int64_t vocab) {                                                   \
    return row_max_body(x, vocab);                                                                            \
  }

SHIPS_DEFINE_VARIANT(default, )
#if SHIPS_X86_VARIANTS
SHIPS_DEFINE_VARIANT(avx2, SHIPS_TARGET_AVX2)
SHIPS_DEFINE_VARIANT(avx512, SHIPS_TARGET_AVX512)
#endif

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

template <typename T>
RowFunctions<T> row_functions() {
  [[maybe_unused]] static const Isa isa = choose_isa();
#if SHIPS_X86_VARIANTS
  if (isa == Isa::kAvx512) return {row_sums_avx512<T>, base_row_avx512<T>, row_max_avx512<T>};
  if (isa == Isa::kAvx2) return {row_sums_avx2<T>, base_row_avx2<T>, row_max_avx2<T>};
#endif
  return {row_sums_default<T>, base_row_default<T>, row_max_default<T>};
}

// One thread's copy of the base row that its ablated rows are compared with.
template <typename T>
class BaseRow {
 public:
  BaseRow(const RowFunctions<T>& functions, int64_t vocab) : functions_(functions), e_b_(vocab), z_(vocab) {}

  void load(const T* x, int64_t vocab) {
    const double largest = functions_.row_max(x, vocab);
    valid_ = std::isfinite(largest);  // not with +inf, or nothing but -inf and NaN
    if (!valid_) return;
    argmax_ = 0;
    while (to_f64(x[argmax_]) != largest) ++argmax_;
    total_ = functions_.base_row(x, e_b_.data(), z_.data(), vocab, largest);
  }

  double kl_nats(const T* x, int64_t vocab) const {
    if (!valid_) return kNaN;
    double pivot = to_f64(x[argmax_]);
    RowSums sums = functions_.row_sums(x, e_b_.data(), z_.data(), vocab, pivot);
    if (!(sums.exps < kLargestSum)) {  // also NaN, and with an infinite pivot
      pivot = functions_.row_max(x, vocab);  // if this is not finite, NaN comes out below
      sums = functions_.row_sums(x, e_b_.data(), z_.data(), vocab, pivot);
    }
    const double log_ratio = std::fabs(sums.difference) < 0.5 * total_ ? std::log1p(sums.difference / total_)
                                                                       : std::log(sums.exps / total_);
    const double kl = log_ratio - sums.weighted / total_;
    return kl < 0.0 ? 0.0 : kl;  // KL >= 0: what is below is rounding
  }

 private:
  RowFunctions<T> functions_;
  std::vector<double> e_b_, z_;  // [V]
  int64_t argmax_ = 0;
  double total_ = 0.0;
  bool valid_ = false;
};

// The ablated rows in the order of their base rows, so that each base row is prepared once per thread.
std::vector<int64_t> group_by_base_row(const KlRows& rows) {
  std::vector<int64_t> next(rows.num_base + 1, 0);
  for (int64_t i = 0; i < rows.num_ablated; ++i) ++next[rows.row_map[i] + 1];
  std::partial_sum(next.begin(), next.end(), next.begin());
  std::vector<int64_t> order(rows.num_ablated);
  for (int64_t i = 0; i < rows.num_ablated; ++i) order[next[rows.row_map[i]]++] = i;
  return order;
}

template <typename T>
void run(const KlRows& rows) {
  const RowFunctions<T> functions = row_functions<T>();
  const std::vector<int64_t> order = group_by_base_row(rows);
  const int64_t rows_per_task = (kElementsPerTask + rows.vocab - 1) / rows.vocab;
  const T* base = static_cast<const T*>(rows.base);
  const T* ablated = static_cast<const T*>(rows.ablated);
  torch::stable::parallel_for(0, rows.num_ablated, rows_per_task, [&](int64_t begin, int64_t end) {
    BaseRow<T> base_row(functions, rows.vocab);
    int64_t loaded = -1;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i = order[k];
      const int64_t p = rows.row_map[i];
      if (p != loaded) {
        base_row.load(base + p * rows.base_stride, rows.vocab);
        loaded = p;
      }
      rows.kl_nats[i] = base_row.kl_nats(ablated + i * rows.ablated_stride, rows.vocab);
    }
  });
}

}  // namespace

void kl_rows_cpu(const KlRows& rows) {
  switch (rows.type) {
    case LogitType::kBFloat16: return run<BFloat16>(rows);
    case LogitType::kFloat16: return run<Float16>(rows);
    case LogitType::kFloat32: return run<float>(rows);
    case LogitType::kFloat64: return run<double>(rows);
  }
}

}  // namespace shipsfast
