// One element's Adam update against Eq. 2 written out in double.
#include "adam.h"

#include "check.h"

using namespace fuse_ext;

namespace {

struct State {
  double param, exp_avg, exp_avg_sq, max_exp_avg_sq;
};

// Eq. 2 as torch.optim.Adam has it, and with the paper's constant inside the root.
State expected_step(const State& s, double stored_grad, const AdamOptions& o, bool amsgrad) {
  const double raw = (o.maximize ? -stored_grad : stored_grad) / o.grad_divisor;
  const double grad = raw + (o.decoupled_weight_decay ? 0.0 : o.weight_decay * s.param);
  const double keep = o.decoupled_weight_decay ? 1 - o.lr * o.weight_decay : 1.0;
  const double k = static_cast<double>(o.step);
  State out;
  out.exp_avg = o.beta1 * s.exp_avg + (1 - o.beta1) * grad;
  out.exp_avg_sq = o.beta2 * s.exp_avg_sq + (1 - o.beta2) * grad * grad;
  out.max_exp_avg_sq = amsgrad ? std::fmax(s.max_exp_avg_sq, out.exp_avg_sq) : s.max_exp_avg_sq;
  const double second = amsgrad ? out.max_exp_avg_sq : out.exp_avg_sq;
  const double corrected = (second + o.eps_in_root) / (1 - std::pow(o.beta2, k));
  out.param = s.param * keep -
              o.lr * (out.exp_avg / (1 - std::pow(o.beta1, k))) / (std::sqrt(corrected) + o.eps);
  return out;
}

template <class T, bool amsgrad>
void check_step(check::Random& random, const AdamOptions& o) {
  const AdamCoefficients<T> coefficients = adam_coefficients<T>(o);
  const double u = sizeof(T) == sizeof(float) ? 0x1p-24 : 0x1p-53;
  T param = static_cast<T>(random.normal()), grad = static_cast<T>(random.normal());
  T m = static_cast<T>(random.normal()), v = static_cast<T>(random.uniform());
  T v_max = static_cast<T>(random.uniform());
  const State before{param, m, v, v_max};
  const State expected = expected_step(before, grad, o, amsgrad);
  const T raw =
      adam_element<T, amsgrad>(param, grad, m, v, amsgrad ? &v_max : nullptr, coefficients);
  // A dozen roundings, each relative to the largest number that takes part.
  const double g = std::fabs(static_cast<double>(grad)) / o.grad_divisor +
                   o.weight_decay * std::fabs(before.param);
  const double error_m = 16 * u * (std::fabs(before.exp_avg) + g);
  const double second = amsgrad ? expected.max_exp_avg_sq : expected.exp_avg_sq;
  const double k = static_cast<double>(o.step);
  const double rate = o.lr / (1 - std::pow(o.beta1, k)) /
                      (std::sqrt((second + o.eps_in_root) / (1 - std::pow(o.beta2, k))) + o.eps);
  CHECK_NEAR(m, expected.exp_avg, error_m);
  CHECK_NEAR(v, expected.exp_avg_sq, 16 * u * (before.exp_avg_sq + g * g));
  CHECK_NEAR(v_max, expected.max_exp_avg_sq, 16 * u * (before.exp_avg_sq + g * g));
  CHECK_NEAR(param, expected.param, 16 * u * std::fabs(before.param) + rate * error_m);
  CHECK_NEAR(raw, (o.maximize ? -1.0 : 1.0) * static_cast<double>(grad) / o.grad_divisor,
             4 * u * g);
}

}  // namespace

int main() {
  check::Random random(1);
  for (const std::int64_t step : {1, 2, 10, 1000, 1000000}) {
    for (const double decay : {0.0, 0.1}) {
      for (const bool decoupled : {false, true}) {
        for (const bool maximize : {false, true}) {
          for (const double divisor : {1.0, 1024.0, 0.3}) {
            for (const double in_root : {0.0, 0.01}) {
              const AdamOptions o{step,    0.01,  0.9,       0.999,    1e-8,
                                  in_root, decay, decoupled, maximize, divisor};
              for (int i = 0; i < 10; ++i) {
                check_step<float, false>(random, o);
                check_step<float, true>(random, o);
                check_step<double, false>(random, o);
                check_step<double, true>(random, o);
              }
            }
          }
        }
      }
    }
  }
  // The paper's form, Eq. 2c: x - lr sqrt(1 - b2^k) / (1 - b1^k) m / sqrt(v + a).
  double param = 1, m = 0, v = 0;
  const AdamOptions paper{1, 0.1, 0.9, 0.99, 0.0, 0.04, 0.0, false, false, 1.0};
  adam_element<double, false>(param, 2.0, m, v, nullptr, adam_coefficients<double>(paper));
  CHECK_NEAR(param, 1 - 0.1 * std::sqrt(0.01) / 0.1 * 0.2 / std::sqrt(0.04 + 0.04), 1e-15);
  return check::result();
}
