// SPDX-License-Identifier: Apache-2.0
// Lion's update of a plan's segments: arXiv 2302.06675, algorithm 2. Each number is rounded where torch's own operations
// round it, so that every bit is the reference's, whatever compiler and processor make of the loops.
#pragma once

#include <cmath>

#include "step.h"

namespace blockwise {

// A value that the compiler does not know: it can't merge what made it with what is made of it.
template <class W>
W opaque(W value) {
  const volatile W kept = value;
  return kept;
}

// a + weight * (b - a) as torch's lerp computes it: from the nearer end, with one rounding of product and sum.
template <class W>
struct Lerp {
  W factor, from_end;  // from_end: 1 or 0

  explicit Lerp(double weight) : factor(W(weight)), from_end(std::abs(W(weight)) < W(0.5) ? W(0) : W(1)) {
    factor -= from_end;
  }

  W operator()(W start, W end) const { return std::fma(factor, end - start, from_end != 0 ? end : start); }
};

// One tensor in one step, without a second moment; the interface of `Step` that `update_all` needs.
template <class P, class G, class M, class W>
class LionStep {
 public:
  LionStep(Plan& plan, const Tensors<P, G, M, W>& tensors, const Scalars& scalars)
      : plan_(plan), t_(tensors), s_(scalars) {}

  void update(const Segment& segment) const {
    const Run& run = plan_.runs[segment.run];
    if (s_.cautious != 0)
      elements<true>(run, segment.start, segment.numel);
    else
      elements<false>(run, segment.start, segment.numel);
    t_.write_copy(segment.start, segment.numel);
  }

 private:
  // A number without a sign moves nothing: 0, -0 and NaN are neither above nor below 0.
  template <bool cautious>
  void elements(const Run& run, int64_t start, int64_t n) const {
    const auto times = [](double a, double b) { return opaque(a * b); };
    const double lr = block_lr(run, s_, times);
    const Lerp<W> ahead(1 - run.beta1_or(s_.beta1)), moment(1 - run.beta2_or(s_.beta2));
    const W size = W(lr), decay = W(1 - times(lr, times(s_.weight_decay, run.weight_decay_multiplier)));
    // -0 changes no number; the product before it is rounded as if it had been written to memory
    const W nothing = opaque(W(-0.0));
    // read before anything is written, through pointers that may alias: see `Step::apply`
    P* p = t_.param + start;
    const auto g = t_.grad + start;
    M* m = t_.exp_avg + start;
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
      const W grad = W(load(g[k])), old = W(load(m[k])), was = W(load(p[k]));
      const W direction = ahead(old, grad), now = moment(old, grad), decayed = was * decay + nothing;
      const bool up = direction < 0, down = direction > 0;
      // without branches, or compilers test element by element
      const bool grows = cautious & ((up & (was > 0)) | (down & (was < 0)));
      const W moved = (grows ? was : decayed) - (down ? size : up ? -size : W(0));
      store(m[k], now);
      store(p[k], moved);
    }
  }

  Plan& plan_;
  Tensors<P, G, M, W> t_;
  Scalars s_;
};

}  // namespace blockwise
