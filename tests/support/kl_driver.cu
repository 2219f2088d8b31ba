// Instantiates the kernels of csrc/ships_kl.cuh and csrc/ships_divergence.cuh for test_csrc_nvcc.py, and, run
// without a GPU, measures the accuracy of their arithmetic on the host against long double. Prints one `name value` per line.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/ships_divergence.cuh"
#include "../../csrc/ships_kl.cuh"

namespace shipsfast {
template void launch_kl_rows<__nv_bfloat16>(const KlRows&, TwoFloat*, BaseStats*, cudaStream_t);
template void launch_kl_rows<__half>(const KlRows&, TwoFloat*, BaseStats*, cudaStream_t);
template void launch_kl_rows<float>(const KlRows&, TwoFloat*, BaseStats*, cudaStream_t);
template void launch_kl_rows<double>(const KlRows&, TwoFloat*, BaseStats*, cudaStream_t);
template void launch_divergence_rows<__nv_bfloat16>(const DivergenceRows&, RowNorm*, cudaStream_t);
template void launch_divergence_rows<__half>(const DivergenceRows&, RowNorm*, cudaStream_t);
template void launch_divergence_rows<float>(const DivergenceRows&, RowNorm*, cudaStream_t);
template void launch_divergence_rows<double>(const DivergenceRows&, RowNorm*, cudaStream_t);
}  // namespace shipsfast

using namespace shipsfast;

// Largest relative error of exp_pair on [low, high].
static double exp_error(double low, double high) {
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> uniform(low, high);
  double worst = 0.0;
  for (int i = 0; i < 200000; ++i) {
    const double x = uniform(random);
    const float hi = static_cast<float>(x);
    const float lo = static_cast<float>(x - hi);
    const TwoFloat e = exp_pair({hi, lo}, kExp2Host);
    const long double exact = std::exp(static_cast<long double>(hi) + lo);
    worst = std::fmax(worst, std::fabs(static_cast<double>((static_cast<long double>(e.hi) + e.lo - exact) / exact)));
  }
  return worst;
}

// Largest absolute error in nats of one row's KL, its elements dealt to threads as on the device.
template <typename T>
static double kl_error(int vocab, double spread, double change) {
  double worst = 0.0;
  for (int seed = 0; seed < 8; ++seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    std::vector<T> x_b(vocab), x_a(vocab);
    int at = 0;
    for (int v = 0; v < vocab; ++v) {
      const double x = spread * normal(random);
      x_b[v] = static_cast<T>(x);
      x_a[v] = static_cast<T>(x + change * normal(random));
      if (x_b[v] > x_b[at]) at = v;
    }
    std::vector<RowSums> threads(kKlThreads);
    std::vector<TwoFloat> base_sums(kKlThreads, {0.0f, 0.0f});
    for (int v = 0; v < vocab; ++v) {
      const TwoFloat e_b = exp_pair(distance(x_b[v], x_b[at]), kExp2Host);
      base_sums[v % kKlThreads] = plus(base_sums[v % kKlThreads], e_b);
      add_logit(threads[v % kKlThreads], x_a[v], x_b[v], e_b, x_a[at], x_b[at], kExp2Host);
    }
    double exps = 0.0, difference = 0.0, weighted = 0.0, base_exps = 0.0;
    for (int i = 0; i < kKlThreads; ++i) {
      exps += static_cast<double>(threads[i].exps.hi) + threads[i].exps.lo;
      difference += static_cast<double>(threads[i].difference.hi) + threads[i].difference.lo;
      weighted += static_cast<double>(threads[i].weighted.hi) + threads[i].weighted.lo;
      base_exps += static_cast<double>(base_sums[i].hi) + base_sums[i].lo;
    }
    long double sum_b = 0.0L, shift = 0.0L, mean = 0.0L;
    for (int v = 0; v < vocab; ++v) sum_b += std::exp(static_cast<long double>(x_b[v]) - x_b[at]);
    for (int v = 0; v < vocab; ++v) {
      const long double p = std::exp(static_cast<long double>(x_b[v]) - x_b[at]) / sum_b;
      const long double d = static_cast<long double>(x_a[v]) - x_b[v];
      shift += p * std::expm1(d);
      mean += p * d;
    }
    const double exact = static_cast<double>(std::log1p(shift) - mean);
    worst = std::fmax(worst, std::fabs(kl_from_sums(exps, difference, weighted, base_exps) - exact));
  }
  return worst;
}

// Largest relative error of one row's divergences, for float32 logits `change` apart, by their definitions in
// long double: its 64 bits leave 1e-19 / change of KL and JS, so `change` is not to be tiny.
static double divergence_error(int vocab, double spread, double change, int bit) {
  double worst = 0.0;
  for (int seed = 0; seed < 8; ++seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    std::vector<float> x_b(vocab), x_a(vocab);
    RowNorm a_norm{-HUGE_VAL, 0.0}, b_norm{-HUGE_VAL, 0.0};
    for (int v = 0; v < vocab; ++v) {
      const double x = spread * normal(random);
      x_b[v] = static_cast<float>(x);
      x_a[v] = static_cast<float>(x + change * normal(random));
      a_norm.largest = std::fmax(a_norm.largest, x_a[v]);
      b_norm.largest = std::fmax(b_norm.largest, x_b[v]);
    }
    long double sum_a = 0.0L, sum_b = 0.0L;
    for (int v = 0; v < vocab; ++v) {
      a_norm.log_sum += exp_f64(clamp_exponent(x_a[v] - a_norm.largest));
      b_norm.log_sum += exp_f64(clamp_exponent(x_b[v] - b_norm.largest));
      sum_a += std::exp(static_cast<long double>(x_a[v]));
      sum_b += std::exp(static_cast<long double>(x_b[v]));
    }
    a_norm.log_sum = std::log(a_norm.log_sum);
    b_norm.log_sum = std::log(b_norm.log_sum);
    const double shift = (a_norm.largest - b_norm.largest) + (a_norm.log_sum - b_norm.log_sum);
    const long double shift_exact = std::log(sum_a / sum_b);
    DivergenceSums sums;
    long double exact[4] = {};
    for (int v = 0; v < vocab; ++v) {
      sums += divergence_terms<true>(x_a[v], x_b[v], a_norm, b_norm, shift);
      const long double p_b = std::exp(static_cast<long double>(x_b[v])) / sum_b;
      const long double d = static_cast<long double>(x_a[v]) - x_b[v] - shift_exact;
      const long double ratio_less_1 = std::expm1(d);
      exact[0] += p_b * (ratio_less_1 - d);
      exact[1] += p_b * (d * ratio_less_1 - (ratio_less_1 - d));
      exact[2] += p_b * (d * (1.0L + ratio_less_1) - (2.0L + ratio_less_1) * std::log1p(ratio_less_1 / 2)) / 2;
      exact[3] += p_b * std::fabs(ratio_less_1) / 2;
    }
    double result = 0.0;
    store_divergences(sums, int64_t{1} << bit, &result, 1);
    worst = std::fmax(worst, std::fabs(static_cast<double>((result - exact[bit]) / exact[bit])));
  }
  return worst;
}

int main() {
  std::printf("exp_near_zero %.3e\n", exp_error(-20.0, 0.0));
  std::printf("exp_full_range %.3e\n", exp_error(-80.0, 85.0));
  std::printf("kl_same %.3e\n", kl_error<float>(32000, 4.0, 0.0));
  std::printf("kl_tiny_change %.3e\n", kl_error<float>(32000, 4.0, 1e-6));
  std::printf("kl_small_change %.3e\n", kl_error<float>(32000, 4.0, 0.01));
  std::printf("kl_large_change %.3e\n", kl_error<float>(128256, 4.0, 2.0));
  std::printf("kl_flat %.3e\n", kl_error<float>(128256, 0.1, 0.3));
  std::printf("kl_float64 %.3e\n", kl_error<double>(32000, 4.0, 0.3));
  const char* names[4] = {"kl", "reverse_kl", "js", "total_variation"};
  for (int bit = 0; bit < 4; ++bit) {
    std::printf("%s_small_relative %.3e\n", names[bit], divergence_error(32000, 4.0, 0.001, bit));
    std::printf("%s_large_relative %.3e\n", names[bit], divergence_error(32000, 4.0, 3.0, bit));
  }
  return 0;
}
