// SPDX-License-Identifier: Apache-2.0
// Storage formats and the sum of squares. Arithmetic is float, or double for double parameters.
#pragma once

#include <cstdint>
#include <cstring>

namespace blockwise {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float load(float value) { return value; }
inline double load(double value) { return value; }
inline float load(bfloat16 value) { return float_of_bits(uint32_t(value.bits) << 16); }

// Branch-free, so that loops over it become SIMD code without F16C or AVX512-FP16.
inline float load(float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(value.bits & 0x7fffu) << 13;
  // moves the exponent by multiplying, which makes subnormals right as well
  const float scaled = float_of_bits(magnitude) * float_of_bits(0x77800000u);
  const uint32_t special = bits_of_float(scaled) | 0x7f800000u;
  const uint32_t finite = bits_of_float(scaled);
  return float_of_bits(sign | ((value.bits & 0x7c00u) == 0x7c00u ? special : finite));
}

inline void store(float& to, float value) { to = value; }
inline void store(double& to, double value) { to = value; }

// Round to nearest, ties to even; a NaN stays one.
inline void store(bfloat16& to, float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = uint16_t(nan ? ((bits >> 16) | 0x40u) : rounded);
}

inline void store(float16& to, float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // below 2^-14 the result is subnormal: adding 0.5 lets the FPU round to its 2^-24 grid
  const uint32_t small = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t odd = (magnitude >> 13) & 1u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + odd) >> 13;
  const uint32_t finite = magnitude < 0x38800000u ? small : normal;
  const uint32_t overflow = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  to.bits = uint16_t(sign | (magnitude >= 0x477ff000u ? overflow : finite));
}

inline void store(bfloat16& to, double value) { store(to, float(value)); }
inline void store(float16& to, double value) { store(to, float(value)); }

// A sum of squares in lanes. The order of additions depends on the number of elements alone, not on addresses, threads or
// what else the loop does, so partial results are reproducible.
struct SquareSum {
  static constexpr int lanes = 32;
  double sums[lanes] = {};

  template <class G>
  inline void add(const G* g) {
#pragma omp simd
    for (int k = 0; k < lanes; ++k) {
      const double x = load(g[k]);
      sums[k] += x * x;
    }
  }

  template <class G>
  inline void add(const G* g, int64_t n) {
    for (int64_t k = 0; k < n; ++k) {
      const double x = load(g[k]);
      sums[k] += x * x;
    }
  }

  inline double take() {
    for (int width = lanes / 2; width; width /= 2)
      for (int k = 0; k < width; ++k) sums[k] += sums[k + width];
    const double total = sums[0];
    for (double& sum : sums) sum = 0;
    return total;
  }
};

template <class G>
double sum_squares(const G* g, int64_t n) {
  SquareSum sum;
  int64_t i = 0;
  for (; i + SquareSum::lanes <= n; i += SquareSum::lanes) sum.add(g + i);
  sum.add(g + i, n - i);
  return sum.take();
}

}  // namespace blockwise
