// Arithmetic in pairs of floats, hi + lo: 48 bits, on the device and the host alike.
#pragma once

#include <cmath>
#include <cstring>

#define SHIPS_HD __host__ __device__ __forceinline__

namespace shipsfast {

constexpr float kLowestExponent = -80.0f;  // exp is 2e-35: nothing beside a sum of at least 1, yet positive
constexpr float kHighestExponent = 85.0f;

struct TwoFloat {
  float hi, lo;  // hi + lo, with |lo| <= ulp(hi) / 2
};

// 2^(k/32) for k = 0 .. 31
#define SHIPS_EXP2_TABLE \
  {0x1p+0f, 0x0.0p+0f}, {0x1.059b0ep+0f, -0x1.9d4f52p-25f}, {0x1.0b5586p+0f, 0x1.9f3122p-25f}, {0x1.11301ep+0f, -0x1.fdb496p-25f}, \
  {0x1.172b84p+0f, -0x1.c15742p-27f}, {0x1.1d4874p+0f, -0x1.d2e8cap-25f}, {0x1.2387a6p+0f, 0x1.ceac48p-25f}, {0x1.29e9ep+0f, -0x1.5c0424p-25f}, \
  {0x1.306fep+0f, 0x1.4636e2p-25f}, {0x1.371a74p+0f, -0x1.18aac6p-25f}, {0x1.3dea64p+0f, 0x1.824684p-25f}, {0x1.44e086p+0f, 0x1.8624b4p-30f}, \
  {0x1.4bfdaep+0f, -0x1.593abcp-25f}, {0x1.5342b6p+0f, -0x1.2c561p-25f}, {0x1.5ab07ep+0f, -0x1.5bd5ecp-27f}, {0x1.6247ecp+0f, -0x1.f8b55p-25f}, \
  {0x1.6a09e6p+0f, 0x1.9fcef4p-26f}, {0x1.71f75ep+0f, 0x1.1d8beep-25f}, {0x1.7a1148p+0f, -0x1.829fdp-25f}, {0x1.82589ap+0f, -0x1.accc7cp-26f}, \
  {0x1.8ace54p+0f, 0x1.15506ep-27f}, {0x1.93737cp+0f, -0x1.e64744p-25f}, {0x1.9c4918p+0f, 0x1.51f848p-27f}, {0x1.a5503cp+0f, -0x1.b83b54p-25f}, \
  {0x1.ae89fap+0f, -0x1.a94b14p-26f}, {0x1.b7f77p+0f, -0x1.a09438p-25f}, {0x1.c199bep+0f, -0x1.3d56b2p-27f}, {0x1.cb720ep+0f, -0x1.8837ccp-27f}, \
  {0x1.d5818ep+0f, -0x1.822dbcp-27f}, {0x1.dfc974p+0f, -0x1.908c94p-25f}, {0x1.ea4afap+0f, 0x1.52486cp-27f}, {0x1.f50766p+0f, -0x1.246ebp-26f}

static __constant__ TwoFloat kExp2Device[32] = {SHIPS_EXP2_TABLE};
static const TwoFloat kExp2Host[32] = {SHIPS_EXP2_TABLE};

// The compiler may not contract these into a fused multiply-add: the error terms below depend on it.
SHIPS_HD float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

SHIPS_HD float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

SHIPS_HD int bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_int(x);
#else
  int bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

SHIPS_HD float float_of(int bits) {
#ifdef __CUDA_ARCH__
  return __int_as_float(bits);
#else
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// a + b exactly, for any a and b (Knuth)
SHIPS_HD TwoFloat two_sum(float a, float b) {
  const float sum = add(a, b);
  const float b_part = add(sum, -a);
  return {sum, add(add(a, -add(sum, -b_part)), add(b, -b_part))};
}

// a + b exactly, for |a| >= |b| (Dekker)
SHIPS_HD TwoFloat fast_two_sum(float a, float b) {
  const float sum = add(a, b);
  return {sum, add(b, -add(sum, -a))};
}

SHIPS_HD TwoFloat plus(TwoFloat a, TwoFloat b) {
  const TwoFloat sum = two_sum(a.hi, b.hi);
  return fast_two_sum(sum.hi, add(sum.lo, add(a.lo, b.lo)));
}

SHIPS_HD TwoFloat negative(TwoFloat a) { return {-a.hi, -a.lo}; }

SHIPS_HD TwoFloat times(TwoFloat a, TwoFloat b) {
  const float product = multiply(a.hi, b.hi);
  const float error = fmaf(a.hi, b.hi, -product);
  return fast_two_sum(product, fmaf(a.hi, b.lo, fmaf(a.lo, b.hi, error)));
}

// exp(x) to about 1e-14, for x clamped to [-80, 85]; NaN gives NaN. x = n ln2/32 + s with |s| <= ln2/64, and
// exp(x) = 2^(n / 32) (1 + s + s^2/2 + ...), the terms up to s^2 in pairs, those above in float.
SHIPS_HD TwoFloat exp_pair(TwoFloat x, const TwoFloat* exp2_table) {
  constexpr float kSteps = 0x1.715476p+5f;     // 32 / ln2
  constexpr float kStepHi = 0x1.62e43p-6f;     // ln2 / 32; n * kStepHi cancels against x without rounding
  constexpr float kStepLo = -0x1.05c610p-34f;
  constexpr float kRound = 12582912.0f;        // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  if (x.hi < kLowestExponent) x = {kLowestExponent, 0.0f};
  if (x.hi > kHighestExponent) x = {kHighestExponent, 0.0f};
  const float rounded = fmaf(x.hi, kSteps, kRound);
  const float n = add(rounded, -kRound);
  const int steps = bits_of(rounded) - bits_of(kRound);
  const TwoFloat s = two_sum(fmaf(-n, kStepHi, x.hi), fmaf(-n, kStepLo, x.lo));

  const float square = multiply(s.hi, s.hi);
  const float square_error = fmaf(s.hi, s.hi, -square);
  const float tail = fmaf(s.hi, fmaf(s.hi, fmaf(s.hi, 1.0f / 720, 1.0f / 120), 1.0f / 24), 1.0f / 6);
  TwoFloat q = fast_two_sum(s.hi, multiply(0.5f, square));  // exp(s) - 1
  q.lo = add(q.lo, fmaf(multiply(square, s.hi), tail, fmaf(0.5f, square_error, fmaf(s.hi, s.lo, s.lo))));

  const TwoFloat power = exp2_table[steps & 31];
  const float product = multiply(power.hi, q.hi);
  const float product_error = fmaf(power.hi, q.hi, -product);
  const TwoFloat sum = fast_two_sum(power.hi, product);
  const float low = fmaf(power.hi, q.lo, fmaf(power.lo, q.hi, add(product_error, power.lo)));
  const TwoFloat e = fast_two_sum(sum.hi, add(sum.lo, low));
  const float scale = float_of(((steps >> 5) + 127) << 23);
  return {multiply(e.hi, scale), multiply(e.lo, scale)};
}

}  // namespace shipsfast
