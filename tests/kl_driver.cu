// Instantiates the kernels of csrc/ships_kl.cuh for test_csrc_nvcc.py, and, run without a GPU, measures the
// accuracy of their arithmetic on the host against long double. Prints one `name value` per line.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../csrc/ships_kl.cuh"

namespace shipsfast {
template void launch_kl_rows<__nv_bfloat16>(const KlRows&, TwoFloat*, BaseStats*, cudaStream_t);
template void launch_kl_rows<__half>(const KlRows&, TwoFloat*, BaseStats*, cudaStream_t);
template void launch_kl_rows<float>(const KlRows&, TwoFloat*, BaseStats*, cudaStream_t);
template void launch_kl_rows<double>(const KlRows&, TwoFloat*, BaseStats*, cudaStream_t);
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

int main() {
  std::printf("exp_near_zero %.3e\n", exp_error(-20.0, 0.0));
  std::printf("exp_full_range %.3e\n", exp_error(-80.0, 85.0));
  std::printf("kl_same %.3e\n", kl_error<float>(32000, 4.0, 0.0));
  std::printf("kl_tiny_change %.3e\n", kl_error<float>(32000, 4.0, 1e-6));
  std::printf("kl_small_change %.3e\n", kl_error<float>(32000, 4.0, 0.01));
  std::printf("kl_large_change %.3e\n", kl_error<float>(128256, 4.0, 2.0));
  std::printf("kl_flat %.3e\n", kl_error<float>(128256, 0.1, 0.3));
  std::printf("kl_float64 %.3e\n", kl_error<double>(32000, 4.0, 0.3));
  return 0;
}
