// Clouds whose neighbours in space are neighbours in memory, cut into tiles, so that a pass can leave out pairs of
// tiles that are too far apart to matter (Kernels::prunes).
//
// The tiles are the leaves of a k-d tree. Of the squared cost only the inner products matter, for the rest depends on x
// or on y alone and goes into the potentials; and inner products stay if x is scaled by s and y by 1 / s. So boxes are
// those of aligned clouds, each centred on its own mean, with the same variance in each coordinate. Between these the
// potentials are nearly flat, whatever the displacement or the contraction from one cloud to the other.
#pragma once
#include <vector>

#include "problem.h"

namespace wgan_ext::sinkhorn {

// For points on the CPU the place of each among the user's, [total] int64, problem after problem. Problems that are not
// chosen keep their order; undefined if none is chosen.
Tensor order_of(const Measure& m, const std::vector<bool>& chosen);

// The measure in this order; itself where the order is undefined.
Measure arranged(const Measure& m, const Tensor& order);

// A tensor with one row for each point of the measure in this order, and back in the user's.
Tensor arranged(const Tensor& t, const Measure& m, const Tensor& order);
Tensor restored(const Tensor& t, const Measure& m, const Tensor& order);

// Cloud::boxes and Cloud::aligned for passes between the measure and another.
struct Tiles {
  Tensor boxes, aligned;
};
Tiles tiles_of(const Measure& m, const Measure& other, Cost cost);

}  // namespace wgan_ext::sinkhorn
