// The emulator's instructions of csrc/cuda/ptx.cuh against what the PTX ISA says of them: layouts, rounding, special
// values.
#include "cuda/ptx.cuh"

#include <cmath>

#include "check.h"
#include "cuda/half.cuh"

namespace {

using namespace wgan_ext;

constexpr int kRows = 16, kColumns = 8, kDepth = 16, kLanes = 32;

// Which row and column of an operand a lane's half `half` of register `i` holds (PTX ISA, mma.m16n8k16).
struct Place {
  int row, column;
};
__device__ Place place_of_a(int lane, int i, int half) {
  return {lane / 4 + i % 2 * 8, lane % 4 * 2 + half + i / 2 * 8};
}
__device__ Place place_of_b(int lane, int i, int half) { return {lane % 4 * 2 + half + i * 8, lane / 4}; }

__device__ uint32_t pair_of(Half low, Half high) { return low.bits | uint32_t{high.bits} << 16; }

// c += a b^T for b of [kColumns, kDepth], operands taken one by one.
__global__ void multiply(const Half* a, const Half* b, float* c) {
  const int lane = static_cast<int>(threadIdx.x);
  const auto of_a = [&](int i, int half) {
    const Place p = place_of_a(lane, i, half);
    return a[p.row * kDepth + p.column];
  };
  const auto of_b = [&](int i, int half) {
    const Place p = place_of_b(lane, i, half);
    return b[p.column * kDepth + p.row];
  };
  uint32_t x[4], y[2];
  for (int i = 0; i < 4; ++i) x[i] = pair_of(of_a(i, 0), of_a(i, 1));
  for (int i = 0; i < 2; ++i) y[i] = pair_of(of_b(i, 0), of_b(i, 1));
  float sums[4];
  const auto place = [&](int i) { return (lane / 4 + i / 2 * 8) * kColumns + lane % 4 * 2 + i % 2; };
  for (int i = 0; i < 4; ++i) sums[i] = c[place(i)];
  device::multiply_add(sums, x, y[0], y[1]);
  for (int i = 0; i < 4; ++i) c[place(i)] = sums[i];
}

// The same by load_matrices from shared memory, which copy_async fills.
__global__ void load_and_multiply(const Half* a, const Half* b, float* c) {
  __shared__ __align__(16) Half rows[kRows][kDepth];
  __shared__ __align__(16) Half columns[kRows][kDepth];  // the second half is not used
  const int lane = static_cast<int>(threadIdx.x);
  device::copy_async(&rows[lane / 2][lane % 2 * 8], a + lane * 8);
  if (lane < kRows) device::copy_async(&columns[lane / 2][lane % 2 * 8], b + lane * 8);
  if (lane >= kRows) device::copy_async(&columns[lane / 2][lane % 2 * 8], a);
  device::wait_copies();
  __syncthreads();
  uint32_t x[4], y[4];
  device::load_matrices(x, &rows[lane % 16][lane / 16 * 8]);
  device::load_matrices(y, &columns[lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
  float sums[4];
  const auto place = [&](int i) { return (lane / 4 + i / 2 * 8) * kColumns + lane % 4 * 2 + i % 2; };
  for (int i = 0; i < 4; ++i) sums[i] = c[place(i)];
  device::multiply_add(sums, x, y[0], y[1]);
  for (int i = 0; i < 4; ++i) c[place(i)] = sums[i];
}

__global__ void scalars(const float* x, float* powers, float* clamped) {
  const int i = static_cast<int>(threadIdx.x);
  powers[i] = device::quick_exp2(x[i]);
  clamped[i] = device::clamp(x[i], -2, 3);
}

std::vector<Half> halves(const std::vector<float>& x) {
  std::vector<Half> out(x.size());
  for (size_t i = 0; i < x.size(); ++i) device::narrow(out[i], x[i]);
  return out;
}

void check_products() {
  std::vector<float> a = check::random<float>(kRows * kDepth, 1, -9, 9),
                     b = check::random<float>(kColumns * kDepth, 2, -9, 9);
  for (float& x : a) x = std::round(x);  // so that sums are exact
  for (float& x : b) x = std::round(x);
  std::vector<float> c = check::random<float>(kRows * kColumns, 3), want = c;
  for (float& x : c) x = std::round(9 * x);
  want = c;
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j)
      for (int d = 0; d < kDepth; ++d)
        want[static_cast<size_t>(i * kColumns + j)] +=
            a[static_cast<size_t>(i * kDepth + d)] * b[static_cast<size_t>(j * kDepth + d)];
  const std::vector<Half> x = halves(a), y = halves(b);
  std::vector<float> got = c;
  WGAN_EXT_LAUNCH(multiply, 1, kLanes, 0, nullptr, x.data(), y.data(), got.data());
  check::equal("products", got, want);
  got = c;
  WGAN_EXT_LAUNCH(load_and_multiply, 1, kLanes, 0, nullptr, x.data(), y.data(), got.data());
  check::equal("products of loaded matrices", got, want);
}

// Sums are cut off towards zero, addends to 24 bits of the greatest.
void check_rounding() {
  std::vector<float> a(kRows * kDepth, 0), b(kColumns * kDepth, 0), c(kRows * kColumns, 0), want = c;
  const auto sum = [&](int row, float start, float first, float second, float expected) {
    b[0] = 1;
    b[1] = 0x1p-12f;
    a[static_cast<size_t>(row * kDepth)] = first;
    a[static_cast<size_t>(row * kDepth) + 1] = second;
    c[static_cast<size_t>(row * kColumns)] = start;
    want[static_cast<size_t>(row * kColumns)] = expected;
  };
  sum(0, 1, 0, 0x1.8p-12f, 1);                     // 1 + 1.5 2^-24, rounded it would be 1 + 2^-23
  sum(1, -1, 0, -0x1.8p-12f, -1);                  // towards zero, not down
  sum(2, 1, 0, 0x1p-11f, 1 + 0x1p-23f);            // exact
  sum(3, 0x1p-24f, 1, -0x1p-12f, 1);               // exact: 1 + 2^-24 - 2^-24
  sum(4, 0x1.8p-25f, 1, -0x1p-12f, 1 - 0x1p-24f);  // the start loses what is below 2^-24 of 1
  sum(5, INFINITY, 1, 1, INFINITY);
  sum(6, NAN, 1, 1, NAN);
  sum(7, 0, 60000, 60000, 60000 + 60000 * 0x1p-12f);  // beyond what a half holds
  for (size_t row = 0; row < kRows; ++row)
    for (size_t j = 1; j < kColumns; ++j) c[row * kColumns + j] = want[row * kColumns + j] = static_cast<float>(j);
  const std::vector<Half> x = halves(a), y = halves(b);
  WGAN_EXT_LAUNCH(multiply, 1, kLanes, 0, nullptr, x.data(), y.data(), c.data());
  check::equal("rounding", c, want);
}

void check_scalars() {
  const float infinity = INFINITY, nan = NAN;
  const std::vector<float> x = {0, 1, -126, -127, -150, 128, infinity, -infinity, nan, -1e30f, 0.5f, 3.5f};
  const std::vector<float> want_powers = {
      1, 2, 0x1p-126f, 0, 0, infinity, infinity, 0, nan, 0, std::sqrt(2.0f), std::exp2(3.5f)};
  const std::vector<float> want_clamped = {0, 1, -2, -2, -2, 3, 3, -2, nan, -2, 0.5f, 3};
  std::vector<float> powers = check::unset<float>(12), clamped = powers;
  WGAN_EXT_LAUNCH(scalars, 1, 12, 0, nullptr, x.data(), powers.data(), clamped.data());
  check::close("2^x", powers, want_powers, 3e-7);
  check::equal("clamp", clamped, want_clamped);
}

}  // namespace

int main() {
  check_products();
  check_rounding();
  check_scalars();
  return check::verdict();
}
