// SPDX-License-Identifier: Apache-2.0
// Work of one stepped tensor, cut from its segment table once: what is summed, what is updated, in which pieces.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace blockwise {

// Elements per task: 20 to 28 bytes each, so a task streams some megabytes and its start costs nothing.
constexpr int64_t kTask = 131072;
// How many elements before their use memory is asked for: the gradients of the next block, and what is stepped now.
// Far: hardware prefetchers stop at every page. Those of AMD go on, and are led astray by what is asked for from afar:
// Adam-mini's step took 1.2 times as long.
struct Far {
  static constexpr int64_t next = 512, now = 128;
};
struct Near {
  static constexpr int64_t next = 64, now = 64;
};
#if defined(__x86_64__)
inline const bool kIsNear = (__builtin_cpu_init(), __builtin_cpu_is("amd"));
#else
constexpr bool kIsNear = false;
#endif
// Elements summed at a time; a longer block is the sum of such pieces in order, whoever sums them.
constexpr int64_t kPiece = 32768;
// Up to here a block is summed and updated by one thread and its gradient is still in the second-level cache (512 KiB of
// the 1 to 2 MiB that servers have; smaller caches only read it twice).
constexpr int64_t kFused = 262144;
// Elements whose step sizes a cautious update holds at a time: they stay in the first-level cache.
constexpr int64_t kChunk = 512;
// Up to here blocks are stepped many at a time.
constexpr int64_t kShort = 64;
// Strided blocks with fewer consecutive elements are summed column by column.
constexpr int64_t kColumns = 64;

enum class Kind : int32_t {
  elements,  // one second moment per element
  blocks,    // whole blocks, summed and updated in one go
  given,     // parts of blocks whose second moment is complete
  columns,   // one stripe of blocks that recur in every stripe; second moments complete
};

// count x numel consecutive elements; block i has slot + i. For elements and columns count is 1 and element k has
// slot + k: an index of exp_avg_sq, or of Plan::column_scale.
struct Segment {
  int64_t start, count, numel, slot;
  int32_t run;
  Kind kind;
  double inverse = 0;  // of short blocks whose sizes are one power of two: 1 / size, whose product is the quotient
};

// count x numel consecutive elements, one partial sum each.
struct Sum {
  int64_t start, count, numel, partial;
};

// repeat x (columns of blocks of numel elements); one partial sum per block.
struct ColumnSum {
  int64_t start, columns, numel, repeat, stride, partial;
};

// Partial sums of one block, in order: partials[first..last).
struct Combined {
  int64_t slot, first, last;
  int32_t run;
};

struct Group {  // what is summed in one go: blocks that stay here, or blocks that are split over ranks
  std::vector<Sum> sums;
  std::vector<ColumnSum> columns;
  std::vector<Combined> blocks;
  std::vector<int64_t> partials;
};

struct Stripe {  // entries of column_scale: one per column of a strided run
  int64_t first, columns, numel, slot;
  int32_t run;
};

struct Run {
  int64_t start, count, numel, slot, repeat, repeat_stride, block_stride;
  double lr_multiplier, weight_decay_multiplier, lr_multiplier_change;
  double beta1, beta2;  // NaN: those of the tensor

  double beta1_or(double of_tensor) const { return std::isnan(beta1) ? of_tensor : beta1; }
  double beta2_or(double of_tensor) const { return std::isnan(beta2) ? of_tensor : beta2; }
};

struct Plan {
  std::vector<Run> runs;
  std::vector<double> slot_numel;
  std::vector<Segment> segments;
  std::vector<int64_t> tasks;  // segments of task i: tasks[i]..tasks[i + 1]
  Group local, split;
  std::vector<Stripe> stripes;
  int64_t num_partials = 0, num_columns = 0;
  bool shares = false;
  std::vector<double> partial;      // scratch
  std::vector<double> column_scale;  // scratch
};

class Planner {
 public:
  Planner(Plan& plan, const uint8_t* is_split) : plan_(plan), is_split_(is_split) {}

  void build(int64_t num_blocks) {
    if (plan_.shares) count_pieces(num_blocks);
    for (size_t i = 0; i < plan_.runs.size(); ++i) {
      if (plan_.shares)
        add_shared(int32_t(i));
      else
        add_elements(int32_t(i));
    }
    cut_tasks();
    order_partials(plan_.local, partials_local_);
    order_partials(plan_.split, partials_split_);
    plan_.partial.resize(plan_.num_partials);
    plan_.column_scale.resize(plan_.num_columns);
  }

 private:
  struct Piece {  // of a block, in the order of the elements
    int64_t slot, partial;
    int32_t run;
  };
  using Pieces = std::vector<Piece>;

  void count_pieces(int64_t num_blocks) {
    num_pieces_.assign(num_blocks, 0);
    for (const Run& run : plan_.runs) {
      const bool recurs = run.repeat > 1 && run.block_stride == 0;
      for (int64_t r = 0; r < (recurs ? 1 : run.repeat); ++r)
        for (int64_t i = 0; i < run.count; ++i) {
          uint8_t& n = num_pieces_[run.slot + r * run.block_stride + i];
          n = uint8_t(recurs || n ? 2 : 1);
        }
    }
  }

  void add_elements(int32_t index) {
    const Run& run = plan_.runs[index];
    for (int64_t r = 0; r < run.repeat; ++r)
      push(run.start + r * run.repeat_stride, run.count, run.numel, run.start + r * run.repeat_stride, index,
           Kind::elements);
  }

  Kind kind_of(const Run& run, int64_t slot) const {
    if (num_pieces_[slot] != 1 || is_split_[slot] || run.numel > kFused) return Kind::given;
    return run.numel == 1 && plan_.slot_numel[slot] == 1 ? Kind::elements : Kind::blocks;
  }

  void add_shared(int32_t index) {
    const Run& run = plan_.runs[index];
    const bool recurs = run.repeat > 1 && run.block_stride == 0;
    if (recurs && run.numel < kColumns) {
      add_columns(index);
      return;
    }
    for (int64_t r = 0; r < run.repeat; ++r) {
      const int64_t start = run.start + r * run.repeat_stride, slot = run.slot + r * run.block_stride;
      for (int64_t i = 0; i < run.count;) {
        const Kind kind = kind_of(run, slot + i);
        const bool split = is_split_[slot + i];
        int64_t end = i + 1;
        while (end < run.count && kind_of(run, slot + end) == kind && bool(is_split_[slot + end]) == split) ++end;
        const int64_t at = start + i * run.numel;
        push(at, end - i, run.numel, slot + i, index, kind);
        if (kind == Kind::given) push_sums(at, end - i, run.numel, slot + i, split, index);
        i = end;
      }
    }
  }

  void add_columns(int32_t index) {
    const Run& run = plan_.runs[index];
    const int64_t width = run.count * run.numel;
    plan_.stripes.push_back({plan_.num_columns, width, run.numel, run.slot, index});
    for (int64_t r = 0; r < run.repeat; ++r)
      push(run.start + r * run.repeat_stride, width, 1, plan_.num_columns, index, Kind::columns);
    plan_.num_columns += width;
    const int64_t step = std::max<int64_t>(1, 512 / run.numel);
    for (int64_t i = 0; i < run.count;) {
      const bool split = is_split_[run.slot + i];
      int64_t end = i + 1;
      while (end < std::min(run.count, i + step) && bool(is_split_[run.slot + end]) == split) ++end;
      group(split).columns.push_back({run.start + i * run.numel, (end - i) * run.numel, run.numel, run.repeat,
                                      run.repeat_stride, plan_.num_partials});
      for (int64_t b = i; b < end; ++b) pieces(split).push_back({run.slot + b, plan_.num_partials++, index});
      i = end;
    }
  }

  // Segments of at most kTask elements; long blocks are cut, short ones stay together.
  void push(int64_t start, int64_t count, int64_t numel, int64_t slot, int32_t run, Kind kind) {
    if (kind == Kind::elements || kind == Kind::columns) {
      const int64_t total = count * numel;
      for (int64_t k = 0; k < total; k += kTask)
        plan_.segments.push_back({start + k, 1, std::min(kTask, total - k), slot + k, run, kind});
      return;
    }
    if (kind == Kind::given && numel > kTask) {
      for (int64_t b = 0; b < count; ++b)
        for (int64_t k = 0; k < numel; k += kTask)
          plan_.segments.push_back({start + b * numel + k, 1, std::min(kTask, numel - k), slot + b, run, kind});
      return;
    }
    // several long blocks, too: each is summed while the one before it is updated
    const int64_t step = std::max<int64_t>(4, kTask / numel);
    for (int64_t b = 0; b < count; b += step) {
      plan_.segments.push_back({start + b * numel, std::min(step, count - b), numel, slot + b, run, kind});
      if (kind == Kind::blocks) plan_.segments.back().inverse = inverse_of(plan_.segments.back());
    }
  }

  double inverse_of(const Segment& segment) const {
    const double* first = plan_.slot_numel.data() + segment.slot;
    const bool same = std::all_of(first, first + segment.count, [first](double numel) { return numel == *first; });
    int exponent;
    return segment.numel <= kShort && same && std::frexp(*first, &exponent) == 0.5 ? 1 / *first : 0;
  }

  void push_sums(int64_t start, int64_t count, int64_t numel, int64_t slot, bool split, int32_t run) {
    if (numel <= kPiece) {
      const int64_t step = std::max<int64_t>(1, kTask / numel);
      for (int64_t b = 0; b < count; b += step)
        group(split).sums.push_back(
            {start + b * numel, std::min(step, count - b), numel, plan_.num_partials + b});
      for (int64_t b = 0; b < count; ++b) pieces(split).push_back({slot + b, plan_.num_partials++, run});
      return;
    }
    for (int64_t b = 0; b < count; ++b)
      for (int64_t k = 0; k < numel; k += kPiece) {
        group(split).sums.push_back({start + b * numel + k, 1, std::min(kPiece, numel - k), plan_.num_partials});
        pieces(split).push_back({slot + b, plan_.num_partials++, run});
      }
  }

  void cut_tasks() {
    int64_t size = kTask;
    for (size_t s = 0; s < plan_.segments.size(); ++s) {
      if (size >= kTask) {
        plan_.tasks.push_back(int64_t(s));
        size = 0;
      }
      size += plan_.segments[s].count * plan_.segments[s].numel;
    }
    plan_.tasks.push_back(int64_t(plan_.segments.size()));
  }

  static void order_partials(Group& group, Pieces& pieces) {
    std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.slot < b.slot; });
    for (const Piece& piece : pieces) {
      const int64_t at = int64_t(group.partials.size());
      if (group.blocks.empty() || group.blocks.back().slot != piece.slot)
        group.blocks.push_back({piece.slot, at, at, piece.run});
      group.partials.push_back(piece.partial);
      group.blocks.back().last = at + 1;
    }
  }

  Group& group(bool split) { return split ? plan_.split : plan_.local; }
  Pieces& pieces(bool split) { return split ? partials_split_ : partials_local_; }

  Plan& plan_;
  const uint8_t* is_split_;
  std::vector<uint8_t> num_pieces_;
  Pieces partials_local_, partials_split_;
};

}  // namespace blockwise
