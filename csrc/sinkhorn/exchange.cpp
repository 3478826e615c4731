#include "exchange.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/sum.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "solve.h"

namespace wgan_ext::sinkhorn {
namespace {

using at::Tensor;

constexpr int64_t kSums = 7;  // six sums, then a maximum
static_assert(sizeof(Sums) == kSums * sizeof(double));

// An operator of torch's functional collectives, boxed: the type of a group's name differs between versions.
Tensor collective(const char* name, std::vector<c10::IValue> stack) {
  c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(&stack);
  return stack.at(0).toTensor();
}

}  // namespace

Range rows_of(int64_t rank, at::IntArrayRef counts) {
  TORCH_CHECK_VALUE(rank >= 0 && rank < static_cast<int64_t>(counts.size()),
                    "sinkhorn: rank must be that of one of the ", counts.size(), " processes, got ", rank);
  Range rows{0, counts[static_cast<size_t>(rank)]};
  for (int64_t p = 0; p < rank; ++p) rows.begin += counts[static_cast<size_t>(p)];
  return rows;
}

Exchange::Exchange(std::string group, int64_t rank, at::IntArrayRef x_counts, at::IntArrayRef y_counts,
                   at::Device device)
    : group_(std::move(group)),
      processes_(static_cast<int64_t>(x_counts.size())),
      x_(side(rank, x_counts, device)),
      y_(side(rank, y_counts, device)) {
  TORCH_CHECK_VALUE(x_counts.size() == y_counts.size(),
                    "sinkhorn: the counts of x and of y must be of as many processes, got ", x_counts.size(), " and ",
                    y_counts.size());
}

Exchange::Side Exchange::side(int64_t rank, at::IntArrayRef counts, at::Device device) {
  Side side{rows_of(rank, counts), 0, {}};
  bool equal = true;
  for (size_t p = 0; p < counts.size(); ++p) {
    TORCH_CHECK_VALUE(counts[p] >= 0, "sinkhorn: counts must not be negative, got ", counts);
    side.most = std::max(side.most, counts[p]);
    equal = equal && counts[p] == counts[0];
  }
  if (!equal) {
    std::vector<Tensor> places;
    for (size_t p = 0; p < counts.size(); ++p) {
      const int64_t first = static_cast<int64_t>(p) * side.most;
      places.push_back(at::arange(first, first + counts[p], at::kLong));
    }
    side.places = at::cat(places).to(device);
  }
  return side;
}

// The messages of all processes. [processes, size]
Tensor Exchange::all(const Tensor& message) const {
  const Tensor pending = collective("_c10d_functional::all_gather_into_tensor", {message, processes_, group_});
  return collective("_c10d_functional::wait_tensor", {pending}).view({processes_, -1});
}

Tensor Exchange::agreed(const Tensor& values) const {
  return all(values.contiguous().view({-1})).select(0, 0).view(values.sizes());
}

Tensor Exchange::gather(bool of_x, const Tensor& softmin, const Tensor& sums) const {
  const Side& side = of_x ? x_ : y_;
  constexpr int64_t head = kSums * sizeof(double);
  const auto type = softmin.scalar_type();
  const int64_t width = side.most * static_cast<int64_t>(softmin.element_size());
  const Tensor message = at::empty({head + (width + 7) / 8 * 8}, softmin.options().dtype(at::kByte));
  const Tensor mine = message.narrow(0, 0, head).view(at::kDouble), blocks = sums.view(at::kDouble).view({-1, kSums});
  if (blocks.size(0) > 0) {
    mine.narrow(0, 0, kSums - 1).copy_(at::sum(blocks.narrow(1, 0, kSums - 1), {0}));
    mine.select(0, kSums - 1).copy_(at::amax(blocks.select(1, kSums - 1)));
  } else {
    mine.zero_();
  }
  message.narrow(0, head, width)
      .view(type)
      .narrow(0, 0, side.mine.count)
      .copy_(softmin.select(0, 0).narrow(0, side.mine.begin, side.mine.count));
  const Tensor messages = all(message), rows = messages.narrow(1, head, width).view(type);
  if (side.places.defined())
    softmin.copy_(at::index_select(rows.reshape({-1}), 0, side.places).unsqueeze(0));
  else
    softmin.view({processes_, side.most}).copy_(rows);
  return messages.narrow(1, 0, head).contiguous().view(at::kDouble);
}

}  // namespace wgan_ext::sinkhorn
