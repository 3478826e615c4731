// The scores of a critic, their gradient with respect to its input, and the derivative of both.
//
// For layers z_l = W_l h_(l-1) + b_l, h_l = m_l * z_l, where m_l is 1 or the slope by the sign of z_l, the gradient of
// the sum of a sample's outputs is the chain u_(l-1) = (m_l * u_l) W_l, from u = 1 at the outputs down to g = dD/dx.
// Given a cotangent v_0 of g, the chain v_l = m_l * (v_(l-1) W_l^T) yields dW_l = u_l^T v_(l-1); biases and the input
// move only the signs, so their derivatives are 0. Compared with autograd's double backward, which also differentiates
// through z, this is 4 matrix products a layer against 6, and the signs (one bit each) are all that is kept of the
// forward pass.
//
// The gradient of any loss of the scores is the same chain u, each sample times the cotangent c of its score:
// dW_l = u_l^T (c h_(l-1)). So real, fake and interpolates go forth and back through the layers as one batch. Where c
// is known before the chain starts, and the scored rows are no points, u starts from it: dW_l is u_l^T h_(l-1) over the
// scored rows and u_l^T v_(l-1) over the points. Else it is one product with c h in the former rows and v in the
// latter.
//
// Where layers are curved, u_l depends on h_l: a third chain p, from 0 at the outputs down, takes in the derivative of
// <u_l, J_l v_(l-1)> with respect to h_(l-1) at each curved layer, and adds p_l^T h_(l-1) to dW_l and p_l to db_l.
#pragma once
#include "layers.h"

namespace wgan_ext::critic {

// What the forward pass keeps for the backward pass.
struct Tape {
  Tensors values;               // by value
  std::vector<Tensors> extras;  // by layer
  Tensors gradients;            // u, by value
};

class Engine {
 public:
  // The first `scored` rows of x are scored, `points` are where the gradient is taken; every row is one or both.
  Engine(TensorList x, TensorList parameters, IntArrayRef program, Scalars scalars, int64_t scored, Rows points,
         at::ScalarType compute_dtype, bool channels_last);

  struct Forward {
    Tensor scores;      // [scored]
    Tensors gradients;  // of each input, [points, ...]
  };
  // What the loss gains per score, `weights` [scored], can be given beforehand; see backward.
  Forward forward(TensorList x, bool mean_outputs, bool keep, const Tensor& weights = {});
  // The tensors that the forward pass kept, each in memory of its own (x itself is not among them), and the other way.
  Tensors packed() const;
  void unpack(TensorList kept);
  // The gradients of the wanted parameters, and where curved and `of_x` those of the inputs (else undefined). Either
  // cotangent may be undefined.
  struct Backward {
    Tensors parameters, x;
  };
  Backward backward(const Tensor& grad_scores, TensorList grad_gradients, IntArrayRef wanted, bool of_x);
  // The same for the weights given to forward, as the last use of the engine: it lets go of what it kept as it goes,
  // and leaves the gradients in float32 or better.
  Tensors finish(const Tensor& weights, TensorList grad_gradients, IntArrayRef wanted);

 private:
  void analyse();
  Kept kept(const Layer& layer, size_t index, Rows rows) const;
  Tensor operand(int64_t value, const Tensor& c, const Tensor& v) const;
  Backward chains(const Tensor& grad_scores, TensorList grad_gradients, IntArrayRef wanted, bool of_x, bool last);

  TensorList x_, given_;
  std::shared_ptr<const Program> shared_;
  const Program& program_;
  Frame frame_;
  Rows scored_, points_;
  Tape tape_;
  bool weighted_ = false;             // whether u of the scored rows holds the weights of the scores
  std::vector<bool> runs_;            // by layer: whether the forward pass needs its value or its extras
  std::vector<bool> keeps_value_;     // by value: whether the tape does
  std::vector<bool> keeps_gradient_;  // by value: whether the tape keeps its u
};

}  // namespace wgan_ext::critic
