// SPDX-License-Identifier: Apache-2.0
// Storage formats and the sum of squares. Arithmetic is float, or double for double parameters.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace blockwise {

// Elements of short blocks that are summed and then updated in one go: all that this needs stays in half of a first-level
// cache, beside what is asked for next. Twice as many were measured 1.5 times slower.
constexpr int64_t kRoom = 256;
constexpr int kSpread = 16;  // elements that one store of `spread` writes

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

// Gradients stored as G and multiplied by a factor where they are read: Scaled<G> in place of G.
template <class G>
struct Scaled {};

// `nothing` is -0, which changes no number, and which the compiler does not know: so it can't merge the product with a
// sum that comes after it, and each gradient is rounded as if it had been multiplied in memory.
template <class G>
struct ScaledGradients {
  const G* at;
  float factor, nothing;

  ScaledGradients operator+(int64_t n) const { return {at + n, factor, nothing}; }
  float operator[](int64_t k) const { return load(at[k]) * factor + nothing; }
};

// What gradients are read through; `scale` holds the bits of the factor, above them those of `nothing`.
template <class G>
struct Source {
  using Gradients = const G* __restrict__;
  static const G* of(int64_t address, int64_t) { return reinterpret_cast<const G*>(address); }
};

template <class G>
struct Source<Scaled<G>> {
  using Gradients = ScaledGradients<G>;
  static Gradients of(int64_t address, int64_t scale) {
    return {reinterpret_cast<const G*>(address), float_of_bits(uint32_t(scale)), float_of_bits(uint32_t(scale >> 32))};
  }
};

// A sum of squares in lanes. The order of additions depends on the number of elements alone, not on addresses, threads or
// what else the loop does, so partial results are reproducible.
struct SquareSum {
  static constexpr int lanes = 32;
  double sums[lanes] = {};

  template <class Gradients>
  inline void add(Gradients g) {
#pragma omp simd
    for (int k = 0; k < lanes; ++k) {
      const double x = load(g[k]);
      sums[k] += x * x;
    }
  }

  template <class Gradients>
  inline void add(Gradients g, int64_t n) {
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

template <class Gradients>
double sum_squares(Gradients g, int64_t n) {
  SquareSum sum;
  int64_t i = 0;
  for (; i + SquareSum::lanes <= n; i += SquareSum::lanes) sum.add(g + i);
  sum.add(g + i, n - i);
  return sum.take();
}

// Prefetches the cache lines of SquareSum::lanes elements.
template <class T>
inline void ask_for(const T* at) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t k = 0; k < SquareSum::lanes; k += line) __builtin_prefetch(at + k);
}

template <class G>
inline void ask_for(ScaledGradients<G> gradients) {
  ask_for(gradients.at);
}

// Sums of `count` blocks of n squares, n at most 8 * eights, in the order of SquareSum: the lanes that a block does not
// reach hold zeros there, and a zero more changes no sum of squares. Reads up to 8 * eights squares beyond the last.
template <int eights>
void fold_blocks(const double* __restrict__ squares, int64_t count, int64_t n, double* __restrict__ sums) {
  using Eight = double __attribute__((vector_size(64)));
  using Bits = int64_t __attribute__((vector_size(64)));
  using Four = double __attribute__((vector_size(32)));
  using Two = double __attribute__((vector_size(16)));
  Bits reached[eights];
  for (int e = 0; e < eights; ++e)
    for (int k = 0; k < 8; ++k) reached[e][k] = 8 * e + k < n ? -1 : 0;
  for (int64_t i = 0; i < count; ++i) {
    Eight lanes[eights];
    for (int e = 0; e < eights; ++e) {
      Bits bits;
      std::memcpy(&bits, squares + i * n + 8 * e, sizeof bits);
      lanes[e] = Eight(bits & reached[e]);
    }
    for (int width = eights / 2; width; width /= 2)
      for (int e = 0; e < width; ++e) lanes[e] += lanes[e + width];
    Four fours[2];
    std::memcpy(fours, &lanes[0], sizeof fours);
    fours[0] += fours[1];
    Two twos[2];
    std::memcpy(twos, &fours[0], sizeof twos);
    twos[0] += twos[1];
    sums[i] = twos[0][0] + twos[0][1];
  }
}

// Of blocks of two elements, whose squares are exact in a double: no order of rounding to keep.
template <class Gradients>
void sum_pairs(const Gradients g, int64_t count, double* __restrict__ sums) {
  constexpr int64_t pairs = SquareSum::lanes / 2;
  for (int64_t from = 0; from < count; from += pairs) {
    const int64_t to = std::min<int64_t>(from + pairs, count);
    ask_for(g + 2 * from + kRoom);
#pragma omp simd
    for (int64_t i = from; i < to; ++i) {
      const double x = load(g[2 * i]), y = load(g[2 * i + 1]);
      sums[i] = x * x + y * y;
    }
  }
}

// sum_squares of each of `count` consecutive short blocks, kRoom elements at most. One by one they would take most of
// their time for lanes that they do not reach, and for waiting for the end of each sum.
template <class Gradients>
void sum_short_blocks(const Gradients g, int64_t count, int64_t n, double* __restrict__ sums) {
  if (n > SquareSum::lanes || std::is_same<decltype(load(g[0])), double>::value) {
    // the square of a double is rounded, or not where it is added at once: those sums stay in one place
    for (int64_t i = 0; i < count; ++i) sums[i] = sum_squares(g + i * n, n);
    return;
  }
  if (n == 2) return sum_pairs(g, count, sums);
  double squares[kRoom + SquareSum::lanes];
  const int64_t total = count * n;
  for (int64_t from = 0; from < total; from += SquareSum::lanes) {
    const int64_t to = std::min<int64_t>(from + SquareSum::lanes, total);
    ask_for(g + from + kRoom);
#pragma omp simd
    for (int64_t k = from; k < to; ++k) {
      const double x = load(g[k]);
      squares[k] = x * x;
    }
  }
  const double* s = squares;
  switch (n) {
    case 3:
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) sums[i] = (s[3 * i] + s[3 * i + 2]) + s[3 * i + 1];
      return;
    case 4:
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) sums[i] = (s[4 * i] + s[4 * i + 2]) + (s[4 * i + 1] + s[4 * i + 3]);
      return;
  }
  std::fill_n(squares + total, SquareSum::lanes, 0.0);
  if (n <= 8) return fold_blocks<1>(squares, count, n, sums);
  if (n <= 16) return fold_blocks<2>(squares, count, n, sums);
  fold_blocks<4>(squares, count, n, sums);
}

// to[i * n + k] = values[i] for k < n. Writes up to kSpread elements beyond the last, so that every store is a whole
// vector: the block after it writes them again.
template <int lanes, class W>
void spread_lanes(const W* __restrict__ values, int64_t count, int64_t n, W* __restrict__ to) {
  for (int64_t i = 0; i < count; ++i)
    for (int k = 0; k < lanes; ++k) to[i * n + k] = values[i];
}

// Both copies of a float in one integer: compilers make a few vector instructions of this, and one store for each float
// of the loop above.
inline void spread_pairs(const float* __restrict__ values, int64_t count, float* __restrict__ to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t bits = bits_of_float(values[i]), both = bits | bits << 32;
    std::memcpy(to + 2 * i, &both, sizeof both);
  }
}

inline void spread_pairs(const double* __restrict__ values, int64_t count, double* __restrict__ to) {
  spread_lanes<2>(values, count, 2, to);
}

template <class W>
void spread(const W* __restrict__ values, int64_t count, int64_t n, W* __restrict__ to) {
  if (n == 2) return spread_pairs(values, count, to);
  if (n <= 4) return spread_lanes<4>(values, count, n, to);
  if (n <= 8) return spread_lanes<8>(values, count, n, to);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t k = 0; k < n; k += kSpread)
      for (int j = 0; j < kSpread; ++j) to[i * n + k + j] = values[i];
}

}  // namespace blockwise
