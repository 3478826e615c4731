// A solve shared out over the processes of a group: each runs the passes over its own rows of either cloud and gives
// the others what came of them. All else every process does for itself, from the same numbers in the same order, so
// that all decide alike: one collective a pass, and no other while the solve runs.
#pragma once
#include <ATen/core/Tensor.h>

#include <string>

namespace wgan_ext::sinkhorn {

// Rows of a cloud.
struct Range {
  int64_t begin, count;
};

// Those of a process, where the rows of all, in these numbers, follow each other in the order of the ranks.
Range rows_of(int64_t rank, at::IntArrayRef counts);

class Exchange {
 public:
  // The counts are those of every process's rows of x and of y.
  Exchange(std::string group, int64_t rank, at::IntArrayRef x_counts, at::IntArrayRef y_counts, at::Device device);

  // The rows of this process.
  Range rows(bool of_x) const { return of_x ? x_.mine : y_.mine; }
  int64_t processes() const { return processes_; }

  // The first process's values, for all: what torch computes may differ from one processor to another.
  at::Tensor agreed(const at::Tensor& values) const;

  // Completes a softmin [1, count] of which each process has computed its rows. Returns the Sums of all processes,
  // [processes, 7] double, from `sums`, the bytes of those of this one's blocks.
  at::Tensor gather(bool of_x, const at::Tensor& softmin, const at::Tensor& sums) const;

 private:
  struct Side {
    Range mine;
    int64_t most;       // rows of a process
    at::Tensor places;  // [count] of the rows among [processes, most]; undefined where all have as many
  };
  static Side side(int64_t rank, at::IntArrayRef counts, at::Device device);
  at::Tensor all(const at::Tensor& message) const;

  std::string group_;
  int64_t processes_;
  Side x_, y_;
};

}  // namespace wgan_ext::sinkhorn
