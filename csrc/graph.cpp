#include "graph.h"

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include <unordered_map>

namespace wgan_ext {
namespace {

using torch::autograd::Edge;
using torch::autograd::Node;

bool hooked(Node& node) {
  return !node.pre_hooks().empty() || !node.post_hooks().empty() || !node.tensor_pre_hooks().empty() ||
         !node.retains_grad_hooks().empty();
}

}  // namespace

void forget_leaves(const std::vector<at::Tensor>& outputs, const std::vector<at::Tensor>& leaves) {
  std::unordered_map<const Node*, bool> idle;  // the nodes that have been seen, and whether they lead to leaves alone
  for (const at::Tensor& leaf : leaves)
    if (const auto node = torch::autograd::impl::try_get_grad_accumulator(leaf)) idle[node.get()] = true;

  struct Visit {
    Node* node;
    size_t edge;  // the next one to look at
    bool pruned;
  };
  std::vector<Visit> path;  // depth first, without recursion: a graph may be deep
  for (const at::Tensor& output : outputs) {
    if (!output.grad_fn() || idle.count(output.grad_fn().get())) continue;
    path.push_back({output.grad_fn().get(), 0, false});
    while (!path.empty()) {
      Visit& visit = path.back();
      if (visit.edge < visit.node->num_outputs()) {
        Edge& edge = visit.node->next_edges()[visit.edge];
        if (!edge.is_valid()) {
          ++visit.edge;
        } else if (const auto found = idle.find(edge.function.get()); found == idle.end()) {
          path.push_back({edge.function.get(), 0, false});
        } else {
          if (found->second) {
            edge = Edge();
            visit.pruned = true;
          }
          ++visit.edge;
        }
        continue;
      }
      bool leads_on = !visit.pruned || hooked(*visit.node);
      for (const Edge& edge : visit.node->next_edges()) leads_on = leads_on || edge.is_valid();
      idle[visit.node] = !leads_on;
      path.pop_back();
    }
  }
}

}  // namespace wgan_ext
