// Pruning autograd graphs.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

namespace wgan_ext {

// Makes constants of leaves in the graph of outputs: a backward pass through it spends nothing on their gradients.
//
// The points at which a penalty takes the critic's gradient require grad for the sake of that gradient alone, but
// autograd would go on to differentiate the penalty with respect to them, which is another product with each first
// layer. Nodes that lead to nothing else are left out too, unless somebody hooked them.
void forget_leaves(const std::vector<at::Tensor>& outputs, const std::vector<at::Tensor>& leaves);

}  // namespace wgan_ext
