// What the derivatives of Sinkhorn's operators are made of (autograd.cpp, group.cpp).
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <functional>
#include <initializer_list>
#include <string>

#include "ops.h"

namespace wgan_ext::sinkhorn {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// The dispatcher's handle of an operator with the signature of `function`.
#define WGAN_EXT_SINKHORN_HANDLE(function)                                                                      \
  inline const auto& function##_op() {                                                                          \
    static const auto handle =                                                                                  \
        c10::Dispatcher::singleton().findSchemaOrThrow("wgan_ext::" #function, "").typed<decltype(function)>(); \
    return handle;                                                                                              \
  }

inline OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// What the derivatives must know of the call.
struct Kept {
  std::string cost;
  double power;
  OptionalNumber rho_x, rho_y;
  bool balanced() const { return !rho_x && !rho_y; }
  void save(AutogradContext* ctx) const {
    ctx->saved_data["cost"] = cost;
    ctx->saved_data["power"] = power;
    ctx->saved_data["rho_x"] = rho_x;
    ctx->saved_data["rho_y"] = rho_y;
  }
  static Kept load(AutogradContext* ctx) {
    return {ctx->saved_data["cost"].toStringRef(), ctx->saved_data["power"].toDouble(),
            ctx->saved_data["rho_x"].toOptional<double>(), ctx->saved_data["rho_y"].toOptional<double>()};
  }
};

// Refuses to differentiate what it computes: a sentence says what and why.
class RefusedFunction : public torch::autograd::Function<RefusedFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, at::TensorList, const std::string& refusal,
                               const std::function<variable_list()>& compute) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->saved_data["refusal"] = refusal;
    return compute();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, ctx->saved_data["refusal"].toStringRef());
  }
};

// Those that are there.
inline variable_list present(std::initializer_list<OptionalTensor> tensors) {
  variable_list some;
  for (const OptionalTensor& t : tensors)
    if (t && t->defined()) some.push_back(*t);
  return some;
}

// What compute returns, from these inputs.
inline variable_list refused(const char* refusal, std::initializer_list<OptionalTensor> inputs,
                             const std::function<variable_list()>& compute) {
  const variable_list some = present(inputs);
  return RefusedFunction::apply(at::TensorList(some), std::string(refusal), compute);
}

}  // namespace wgan_ext::sinkhorn
