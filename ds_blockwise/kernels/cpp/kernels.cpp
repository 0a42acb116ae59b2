// SPDX-License-Identifier: Apache-2.0
// C interface of the CPU kernels: plans are made once per tensor, a step is one call for all tensors.

#include <cstdint>
#include <utility>
#include <vector>

#include "lion.h"
#include "look.h"
#include "step.h"

namespace {

using namespace blockwise;

enum Dtype : int64_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// One row per tensor, written by backend.py; the order of fields is the interface.
struct Row {
  int64_t plan, param, grad, exp_avg, exp_avg_sq, sums, copy;
  int64_t param_dtype, grad_dtype, exp_avg_dtype, copy_dtype;
  int64_t grad_scale;  // see `Source`; 0: none
};

// S: `Step` or `LionStep`.
template <template <class, class, class, class> class S, class P, class G, class M, class W, class F>
void with_types(const Row& row, const Scalars& scalars, F&& f) {
  Tensors<P, G, M, W> tensors{reinterpret_cast<P*>(row.param),         Source<G>::of(row.grad, row.grad_scale),
                              reinterpret_cast<M*>(row.exp_avg),       reinterpret_cast<W*>(row.exp_avg_sq),
                              reinterpret_cast<const double*>(row.sums), reinterpret_cast<void*>(row.copy),
                              int32_t(row.copy_dtype == kBFloat16)};
  f(S<P, G, M, W>(*reinterpret_cast<Plan*>(row.plan), tensors, scalars));
}

template <template <class, class, class, class> class S, class P, class G, class W, class F>
void with_exp_avg(const Row& row, const Scalars& scalars, F&& f) {
  if (row.exp_avg_dtype == kBFloat16)
    with_types<S, P, G, bfloat16, W>(row, scalars, f);
  else
    with_types<S, P, G, W, W>(row, scalars, f);
}

template <template <class, class, class, class> class S, class P, class W, class F>
void with_grad(const Row& row, const Scalars& scalars, F&& f) {
  switch (row.grad_dtype) {
    case kFloat32: return with_exp_avg<S, P, float, W>(row, scalars, f);
    case kFloat64: return with_exp_avg<S, P, double, W>(row, scalars, f);
    case kBFloat16: return with_exp_avg<S, P, bfloat16, W>(row, scalars, f);
    default: return with_exp_avg<S, P, float16, W>(row, scalars, f);
  }
}

// Only hosts with fp32 master weights scale; every further type would be compiled by everybody.
template <template <class, class, class, class> class S, class F>
void with_scaled_grad(const Row& row, const Scalars& scalars, F&& f) {
  if (row.grad_dtype == kBFloat16)
    with_exp_avg<S, float, Scaled<bfloat16>, float>(row, scalars, f);
  else
    with_exp_avg<S, float, Scaled<float>, float>(row, scalars, f);
}

template <template <class, class, class, class> class S, class F>
void dispatch(const Row& row, const Scalars& scalars, F&& f) {
  if (row.grad_scale) return with_scaled_grad<S>(row, scalars, f);
  switch (row.param_dtype) {
    case kFloat32: return with_grad<S, float, float>(row, scalars, f);
    case kFloat64: return with_grad<S, double, double>(row, scalars, f);
    case kBFloat16: return with_grad<S, bfloat16, float>(row, scalars, f);
    default: return with_grad<S, float16, float>(row, scalars, f);
  }
}

// Called by all threads of a team; threads go on to the next tensor without waiting.
template <class S>
void sum_group(const S& step, const Group& group) {
  const int64_t sums = int64_t(group.sums.size()), columns = int64_t(group.columns.size());
#pragma omp for schedule(dynamic, 1) nowait
  for (int64_t i = 0; i < sums; ++i) step.sum(group.sums[i]);
#pragma omp for schedule(dynamic, 1) nowait
  for (int64_t i = 0; i < columns; ++i) step.sum(group.columns[i]);
}

template <class S>
void complete_blocks(const S& step, const Plan& plan, const double* sums) {
  const int64_t local = int64_t(plan.local.blocks.size()), split = int64_t(plan.split.blocks.size());
#pragma omp for schedule(static) nowait
  for (int64_t i = 0; i < local; ++i)
    step.complete(plan.local.blocks[i].slot, step.combined(plan.local, plan.local.blocks[i]), plan.local.blocks[i].run);
#pragma omp for schedule(static) nowait
  for (int64_t i = 0; i < split; ++i) {
    const Combined& block = plan.split.blocks[i];
    step.complete(block.slot, sums[block.slot], block.run);
  }
}

template <class S>
void update_all(const S& step, const Plan& plan) {
  const int64_t tasks = int64_t(plan.tasks.size()) - 1;
#pragma omp for schedule(dynamic, 1) nowait
  for (int64_t i = 0; i < tasks; ++i)
    for (int64_t s = plan.tasks[i]; s < plan.tasks[i + 1]; ++s) step.update(plan.segments[s]);
}

Plan& plan_of(const Row& row) { return *reinterpret_cast<Plan*>(row.plan); }

template <template <class, class, class, class> class S>
void update_rows(int64_t num_rows, const Row* rows, const Scalars* scalars) {
  for (int64_t i = 0; i < num_rows; ++i)
    dispatch<S>(rows[i], scalars[i], [&](const auto& step) { update_all(step, plan_of(rows[i])); });
}

}  // namespace

extern "C" {

// runs: per run start, count, numel, slot, repeat, repeat_stride, block_stride; settings: per run the doubles of `Run`.
void* ds_blockwise_plan(int64_t num_runs, const int64_t* runs, const double* settings, int64_t num_blocks,
                        const double* slot_numel, const uint8_t* is_split, int64_t shares) {
  Plan* plan = new Plan;
  plan->shares = shares != 0;
  for (int64_t i = 0; i < num_runs; ++i) {
    const int64_t* r = runs + 7 * i;
    const double* s = settings + 5 * i;
    plan->runs.push_back({r[0], r[1], r[2], r[3], r[4], r[5], r[6], s[0], s[1], s[2], s[3], s[4]});
  }
  plan->slot_numel.assign(slot_numel, slot_numel + num_blocks);
  Planner(*plan, is_split).build(num_blocks);
  return plan;
}

void ds_blockwise_free(void* plan) { delete static_cast<Plan*>(plan); }

// Writes sums of squares of the local parts of split blocks into row.sums.
void ds_blockwise_sum_split(int64_t num_rows, const Row* rows, int64_t threads) {
  const Scalars unused{};
#pragma omp parallel num_threads(threads)
  {
    for (int64_t i = 0; i < num_rows; ++i)
      dispatch<Step>(rows[i], unused, [&](const auto& step) { sum_group(step, plan_of(rows[i]).split); });
#pragma omp barrier
    for (int64_t i = 0; i < num_rows; ++i)
      dispatch<Step>(rows[i], unused, [&](const auto& step) {
        const Group& group = plan_of(rows[i]).split;
        double* sums = reinterpret_cast<double*>(rows[i].sums);
        const int64_t n = int64_t(group.blocks.size());
#pragma omp for schedule(static) nowait
        for (int64_t b = 0; b < n; ++b) sums[group.blocks[b].slot] = step.combined(group, group.blocks[b]);
      });
  }
}

// tensors: of each the address, the number of elements and the dtype; sums: of their squares, one each.
void ds_blockwise_square_sums(int64_t num_tensors, const int64_t* tensors, double* sums, int64_t threads) {
  std::vector<std::pair<int64_t, int64_t>> pieces;  // of which tensor, from where
  for (int64_t i = 0; i < num_tensors; ++i)
    for (int64_t k = 0; k < tensors[3 * i + 1]; k += kTask) pieces.push_back({i, k});
  const int64_t n = int64_t(pieces.size());
  std::vector<double> partial(n);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t p = 0; p < n; ++p) {
    const int64_t* tensor = tensors + 3 * pieces[p].first;
    const int64_t from = pieces[p].second, size = std::min(kTask, tensor[1] - from);
    switch (tensor[2]) {
      case kFloat32: partial[p] = sum_squares(reinterpret_cast<const float*>(tensor[0]) + from, size); break;
      case kFloat64: partial[p] = sum_squares(reinterpret_cast<const double*>(tensor[0]) + from, size); break;
      case kBFloat16: partial[p] = sum_squares(reinterpret_cast<const bfloat16*>(tensor[0]) + from, size); break;
      default: partial[p] = sum_squares(reinterpret_cast<const float16*>(tensor[0]) + from, size);
    }
  }
  for (int64_t p = 0; p < n; ++p) sums[pieces[p].first] += partial[p];
}

void ds_blockwise_step(int64_t num_rows, const Row* rows, const Scalars* scalars, int64_t threads) {
  bool several_phases = false;
  for (int64_t i = 0; i < num_rows; ++i) {
    const Plan& plan = plan_of(rows[i]);
    several_phases |= !plan.local.blocks.empty() || !plan.split.blocks.empty();
  }
#pragma omp parallel num_threads(threads)
  {
    if (several_phases) {
      for (int64_t i = 0; i < num_rows; ++i)
        dispatch<Step>(rows[i], scalars[i], [&](const auto& step) { sum_group(step, plan_of(rows[i]).local); });
#pragma omp barrier
      for (int64_t i = 0; i < num_rows; ++i)
        dispatch<Step>(rows[i], scalars[i], [&](const auto& step) {
          complete_blocks(step, plan_of(rows[i]), reinterpret_cast<const double*>(rows[i].sums));
        });
#pragma omp barrier
      for (int64_t i = 0; i < num_rows; ++i)
        dispatch<Step>(rows[i], scalars[i], [&](const auto& step) {
          const Plan& plan = plan_of(rows[i]);
          const int64_t n = int64_t(plan.stripes.size());
#pragma omp for schedule(static) nowait
          for (int64_t s = 0; s < n; ++s) step.fill(plan.stripes[s]);
        });
#pragma omp barrier
    }
    update_rows<Step>(num_rows, rows, scalars);
  }
}

// Lion's; rows have no second moments.
void ds_blockwise_lion_step(int64_t num_rows, const Row* rows, const Scalars* scalars, int64_t threads) {
#pragma omp parallel num_threads(threads)
  update_rows<LionStep>(num_rows, rows, scalars);
}

}  // extern "C"
