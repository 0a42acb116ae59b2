// SPDX-License-Identifier: Apache-2.0
// The update of consecutive elements, and of a plan's segments. AdamW: arXiv 1711.05101, algorithm 2; one second moment
// per block: arXiv 2406.16793, algorithm 1; a learning rate per block: arXiv 2502.19002, section 5; cautious weight decay:
// arXiv 2510.12402, algorithm 1.
#pragma once

#include <cmath>

#include "numbers.h"
#include "plan.h"

namespace blockwise {

struct Scalars {
  double lr, lr_floor, beta1, beta2, eps, weight_decay, bias_correction1, bias_correction2, progress, step, cautious;
};

// One tensor in one step; P, G, M, W: dtypes of param, grad, exp_avg, and of arithmetic and exp_avg_sq. G may be Scaled.
template <class P, class G, class M, class W>
struct Tensors {
  P* param;
  typename Source<G>::Gradients grad;
  M* exp_avg;
  W* exp_avg_sq;
  const double* sums;  // of split blocks, complete over all ranks; by slot
  void* copy;          // 16-bit copy of the new parameters, or null
  int32_t copy_is_bf16;
};

// Factors of a run, rounded once.
template <class W>
struct Factors {
  W keep, decay, size;   // m += keep * (g - m); p *= decay; p -= size * m / denominator
  W beta2, keep2, root;  // v = beta2 * v + keep2 * g^2; denominator = sqrt(v) * root + eps

  Factors(const Run& run, const Scalars& s, W root_of_tensor) {
    const double multiplier = run.lr_multiplier + run.lr_multiplier_change * s.progress;
    const double lr = multiplier * (s.lr - s.lr_floor) + s.lr_floor;
    const double beta1 = run.beta1_or(s.beta1), own_beta2 = run.beta2_or(s.beta2);
    keep = W(1 - beta1);
    decay = W(1 - lr * s.weight_decay * run.weight_decay_multiplier);
    size = W(lr / (std::isnan(run.beta1) ? s.bias_correction1 : 1 - std::pow(beta1, s.step)));
    beta2 = W(own_beta2);
    keep2 = W(1 - own_beta2);
    root = std::isnan(run.beta2) ? root_of_tensor : W(1 / std::sqrt(1 - std::pow(own_beta2, s.step)));
  }
};

template <class P, class G, class M, class W>
class Step {
  using Gradients = typename Source<G>::Gradients;

 public:
  Step(Plan& plan, const Tensors<P, G, M, W>& tensors, const Scalars& scalars)
      : plan_(plan), t_(tensors), s_(scalars), root_(W(1 / std::sqrt(scalars.bias_correction2))) {}

  void sum(const Sum& sum) const {
    if (sum.numel <= kShort) {
      const int64_t step = kRoom / sum.numel;
      for (int64_t i = 0; i < sum.count; i += step)
        sum_short_blocks(t_.grad + sum.start + i * sum.numel, std::min(step, sum.count - i), sum.numel,
                         plan_.partial.data() + sum.partial + i);
      return;
    }
    for (int64_t i = 0; i < sum.count; ++i)
      plan_.partial[sum.partial + i] = sum_squares(t_.grad + sum.start + i * sum.numel, sum.numel);
  }

  void sum(const ColumnSum& sum) const {
    double columns[512] = {};
    for (int64_t r = 0; r < sum.repeat; ++r) {
      const Gradients g = t_.grad + sum.start + r * sum.stride;
#pragma omp simd
      for (int64_t c = 0; c < sum.columns; ++c) {
        const double x = load(g[c]);
        columns[c] += x * x;
      }
    }
    for (int64_t c = 0; c < sum.columns; c += sum.numel) {
      double total = 0;
      for (int64_t k = 0; k < sum.numel; ++k) total += columns[c + k];
      plan_.partial[sum.partial + c / sum.numel] = total;
    }
  }

  double combined(const Group& group, const Combined& block) const {
    double total = 0;
    for (int64_t i = block.first; i < block.last; ++i) total += plan_.partial[group.partials[i]];
    return total;
  }

  // v = beta2 * v + (1 - beta2) * mean; the mean is rounded first, as the reference does
  void complete(int64_t slot, double sum, int32_t run) const {
    const W mean = W(sum / plan_.slot_numel[slot]);
    const double beta2 = plan_.runs[run].beta2_or(s_.beta2);
    W& v = t_.exp_avg_sq[slot];
    v = W(beta2) * v + W(1 - beta2) * mean;
  }

  void fill(const Stripe& stripe) const {
    const Factors<W> f(plan_.runs[stripe.run], s_, root_);
    for (int64_t c = 0; c < stripe.columns; ++c)
      plan_.column_scale[stripe.first + c] = scale(f, stripe.slot + c / stripe.numel);
  }

  void update(const Segment& segment) const {
    const Factors<W> f(plan_.runs[segment.run], s_, root_);
    const bool per_block = segment.kind == Kind::blocks || segment.kind == Kind::given;
    if (per_block && segment.numel <= kShort)
      short_blocks(f, segment);
    else if (s_.cautious != 0)
      update_cautiously(f, segment);
    else if (kIsNear)
      update_plainly<Near>(f, segment);
    else
      update_plainly<Far>(f, segment);
    if (t_.copy != nullptr) copy(segment.start, segment.count * segment.numel);
  }

 private:
  template <class Ahead>
  void update_plainly(const Factors<W>& f, const Segment& segment) const {
    switch (segment.kind) {
      case Kind::elements:
        elements<Ahead>(f, segment.start, segment.numel, t_.exp_avg_sq + segment.slot);
        break;
      case Kind::columns:
        columns(f, segment.start, segment.numel, plan_.column_scale.data() + segment.slot);
        break;
      case Kind::blocks:
        blocks<Ahead>(f, segment);
        break;
      case Kind::given:
        for (int64_t i = 0; i < segment.count; ++i)
          block(f, segment.start + i * segment.numel, segment.numel, W(scale(f, segment.slot + i)));
        break;
    }
  }

  // All kinds in one loop, which takes the scale of each element from a buffer: a second form of every loop above would
  // double the time that compiling takes.
  void update_cautiously(const Factors<W>& f, const Segment& segment) const {
    W scales[kChunk];
    for (int64_t i = 0; i < segment.count; ++i) {
      const int64_t start = segment.start + i * segment.numel, slot = segment.slot + i, n = segment.numel;
      if (segment.kind == Kind::blocks) {
        double sum = 0;
        for (int64_t k = 0; k < n; k += kPiece) sum += sum_squares(t_.grad + start + k, std::min(kPiece, n - k));
        complete(slot, sum, segment.run);
      }
      if (segment.kind == Kind::blocks || segment.kind == Kind::given)
        std::fill_n(scales, std::min(kChunk, n), W(scale(f, slot)));
      for (int64_t k = 0; k < n; k += kChunk) {
        const int64_t size = std::min(kChunk, n - k);
        if (segment.kind == Kind::elements) own_scales(f, start + k, size, t_.exp_avg_sq + slot + k, scales);
        if (segment.kind == Kind::columns) std::copy_n(plan_.column_scale.data() + slot + k, size, scales);
        spare(f, start + k, size, scales);
      }
    }
  }

  void own_scales(const Factors<W>& f, int64_t start, int64_t n, W* __restrict__ v, W* __restrict__ scales) const {
    const Gradients g = t_.grad + start;
    const W beta2 = f.beta2, keep2 = f.keep2, size = f.size, root = f.root, eps = W(s_.eps);
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
      const W grad = W(load(g[k])), square = beta2 * v[k] + keep2 * grad * grad;
      v[k] = square;
      scales[k] = size / (std::sqrt(square) * root + eps);
    }
  }

  // Decays the elements that the update does not move away from zero.
  void spare(const Factors<W>& f, int64_t start, int64_t n, const W* __restrict__ scales) const {
    P* __restrict__ p = t_.param + start;
    const Gradients g = t_.grad + start;
    M* __restrict__ m = t_.exp_avg + start;
    const W keep = f.keep, decay = f.decay;
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
      const W old = W(load(m[k])), was = W(load(p[k]));
      const W now = old + keep * (W(load(g[k])) - old);
      const bool grows = (now < 0 && was > 0) || (now > 0 && was < 0);
      store(m[k], now);
      store(p[k], was * (grows ? W(1) : decay) - scales[k] * now);
    }
  }

  // lr / bias_correction1 / (sqrt(v / bias_correction2) + eps): one division per block instead of one per element
  double scale(const Factors<W>& f, int64_t slot) const {
    const W denominator = std::sqrt(t_.exp_avg_sq[slot]) * f.root + W(s_.eps);
    return double(f.size) / double(denominator);
  }

  // Here and below all that an element needs is read before anything is written, through pointers that may alias, so that
  // compilers keep this order: tensors often lie at the same place in their pages, and a processor takes a read for the
  // write before it whose address has the same low 12 bits, and waits. Writing each as soon as it was known was measured
  // 1.5 times slower in the second-level cache.
  template <class S>
  void apply(const Factors<W>& f, int64_t start, int64_t n, S&& scale_of) const {
    P* p = t_.param + start;
    const auto g = t_.grad + start;
    M* m = t_.exp_avg + start;
    const W keep = f.keep, decay = f.decay;
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
      const W grad = W(load(g[k])), old = W(load(m[k])), was = W(load(p[k]));
      const W now = old + keep * (grad - old), moved = was * decay - scale_of(k) * now;
      store(m[k], now);
      store(p[k], moved);
    }
  }

  void block(const Factors<W>& f, int64_t start, int64_t n, W scale) const {
    apply(f, start, n, [scale](int64_t) { return scale; });
  }

  void columns(const Factors<W>& f, int64_t start, int64_t n, const double* __restrict__ scales) const {
    apply(f, start, n, [scales](int64_t k) { return W(scales[k]); });
  }

  // Sums of many blocks, then their step sizes, then their updates: one after the other, a short block takes less time
  // than its own sum, root and divisions do, each of which waits for the one before.
  void short_blocks(const Factors<W>& f, const Segment& segment) const {
    const int64_t n = segment.numel, step = kRoom / n;
    double sums[kRoom];
    W scales[kRoom], of_elements[kRoom + kSpread];
    for (int64_t i = 0; i < segment.count; i += step) {
      const int64_t count = std::min(step, segment.count - i), start = segment.start + i * n, slot = segment.slot + i;
      if (segment.kind == Kind::blocks) {
        sum_short_blocks(t_.grad + start, count, n, sums);
        make_means(segment, slot, count, sums);
        complete_all(f, slot, count, sums);
      }
      scale_all(f, slot, count, scales);
      spread(scales, count, n, of_elements);
      if (s_.cautious != 0)
        spare(f, start, count * n, of_elements);
      else
        for (int64_t k = 0; k < count * n; k += SquareSum::lanes) {
          ask_for(t_.param + start + k + kRoom), ask_for(t_.exp_avg + start + k + kRoom);
          const W* of = of_elements + k;
          apply(f, start + k, std::min<int64_t>(SquareSum::lanes, count * n - k), [of](int64_t j) { return of[j]; });
        }
    }
  }

  void make_means(const Segment& segment, int64_t slot, int64_t count, double* __restrict__ sums) const {
    const double* __restrict__ numel = plan_.slot_numel.data() + slot;
    const double inverse = segment.inverse;
    if (inverse != 0) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) sums[i] *= inverse;
      return;
    }
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) sums[i] /= numel[i];
  }

  // `complete` and `scale` of consecutive slots
  void complete_all(const Factors<W>& f, int64_t slot, int64_t count, const double* __restrict__ means) const {
    W* __restrict__ v = t_.exp_avg_sq + slot;
    const W beta2 = f.beta2, keep2 = f.keep2;
    for (int64_t from = 0; from < count; from += SquareSum::lanes) {
      const int64_t to = std::min<int64_t>(from + SquareSum::lanes, count);
      ask_for(v + from + kRoom / 2);
#pragma omp simd
      for (int64_t i = from; i < to; ++i) {
        const W mean = W(means[i]);
        v[i] = beta2 * v[i] + keep2 * mean;
      }
    }
  }

  void scale_all(const Factors<W>& f, int64_t slot, int64_t count, W* __restrict__ scales) const {
    const W* __restrict__ v = t_.exp_avg_sq + slot;
    const W root = f.root, eps = W(s_.eps), size = f.size;
    // the quotient of two floats is the one of `scale`: rounded to 53 bits first, it would not round otherwise
    // (Figueroa 1995: innocuous from 2 * 24 + 2 bits on)
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) scales[i] = size / (std::sqrt(v[i]) * root + eps);
  }

  // Updates a block while it sums the next one, so that parameters, state and gradients stream from memory all the
  // time, as in a kernel that needs no sums; summing and updating in turn was measured 10% slower.
  template <class Ahead>
  void blocks(const Factors<W>& f, const Segment& segment) const {
    const int64_t n = segment.numel;
    double sum = 0;
    for (int64_t k = 0; k < n; k += kPiece) sum += sum_squares(t_.grad + segment.start + k, std::min(kPiece, n - k));
    for (int64_t i = 0; i < segment.count; ++i) {
      const int64_t start = segment.start + i * n, slot = segment.slot + i;
      complete(slot, sum, segment.run);
      const W factor = W(scale(f, slot));
      if (i + 1 == segment.count)
        block(f, start, n, factor);
      else
        sum = block_and_next_sum<Ahead>(f, start, n, factor);
    }
  }

  template <class Ahead>
  double block_and_next_sum(const Factors<W>& f, int64_t start, int64_t n, W scale) const {
    constexpr int64_t lanes = SquareSum::lanes;
    const Gradients next = t_.grad + start + n;
    SquareSum squares;
    double sum = 0;
    for (int64_t from = 0; from < n; from += kPiece) {
      const int64_t to = std::min(from + kPiece, n);
      int64_t k = from;
      for (; k + lanes <= to; k += lanes) {
        ask_for(next + k + Ahead::next);
        ask_for(t_.param + start + k + Ahead::now), ask_for(t_.exp_avg + start + k + Ahead::now);
        squares.add(next + k);
        block(f, start + k, lanes, scale);
      }
      squares.add(next + k, to - k);
      block(f, start + k, to - k, scale);
      sum += squares.take();
    }
    return sum;
  }

  template <class Ahead>
  void elements(const Factors<W>& f, int64_t start, int64_t n, W* v) const {
    constexpr int64_t lanes = SquareSum::lanes;
    int64_t k = 0;
    for (; k + lanes <= n; k += lanes) {
      const int64_t next = start + k + Ahead::now;
      ask_for(t_.param + next), ask_for(t_.grad + next), ask_for(t_.exp_avg + next), ask_for(v + k + Ahead::now);
      few_elements(f, start + k, lanes, v + k);
    }
    few_elements(f, start + k, n - k, v + k);
  }

  void few_elements(const Factors<W>& f, int64_t start, int64_t n, W* v) const {
    P* p = t_.param + start;
    const auto g = t_.grad + start;
    M* m = t_.exp_avg + start;
    const W keep = f.keep, decay = f.decay, size = f.size, root = f.root, eps = W(s_.eps);
    const W beta2 = f.beta2, keep2 = f.keep2;
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
      const W grad = W(load(g[k])), old = W(load(m[k])), before = v[k], was = W(load(p[k]));
      const W now = old + keep * (grad - old), square = beta2 * before + keep2 * grad * grad;
      const W moved = was * decay - size * (now / (std::sqrt(square) * root + eps));
      store(m[k], now);
      v[k] = square;
      store(p[k], moved);
    }
  }

  void copy(int64_t start, int64_t n) const {
    if (t_.copy_is_bf16)
      copy_as(static_cast<bfloat16*>(t_.copy) + start, start, n);
    else
      copy_as(static_cast<float16*>(t_.copy) + start, start, n);
  }

  template <class C>
  void copy_as(C* __restrict__ to, int64_t start, int64_t n) const {
    const P* __restrict__ p = t_.param + start;
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) store(to[k], W(load(p[k])));
  }

  Plan& plan_;
  Tensors<P, G, M, W> t_;
  Scalars s_;
  W root_;
};

}  // namespace blockwise
