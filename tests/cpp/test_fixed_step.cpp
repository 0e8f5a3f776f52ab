// What a fixed step decides on the device, case by case. tests/kernels/test_fixed_step.py compares
// many more with the Python twin.
#include "fixed_step.h"

#include <limits>
#include <vector>

#include "check.h"

using namespace fuse_ext;

namespace {

constexpr std::int64_t kSlots = 4;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// A ring in one dimension, f = x^2 / 2: every pair is s = y = 1, and H = 1.
struct Ring {
  explicit Ring(std::int64_t count)
      : data(static_cast<std::size_t>(scalar_offset(kScalarArrays, kSlots))),
        control(kControlSize) {
    state = {data.data(), kSlots};
    state[kCount] = state[kUsable] = static_cast<double>(count);
    state[kOpen] = 2;
    state[kGamma] = state[kDirectionSq] = state[kYDotY] = 1;
    for (const ScalarArray ones : {kRowScale, kGradS, kGradY, kYS, kYY, kGramSY, kGramYY}) {
      const std::int64_t size = scalar_array_size(ones, kSlots);
      for (std::int64_t i = 0; i < size; ++i) state.array(ones)[i] = 1;
    }
    control[kGradSquare] = control[kGradSum] = control[kGradLargest] = control[kParamLargest] = 1;
  }
  double& operator[](Control name) { return control[static_cast<std::size_t>(name)]; }
  void decide(const FixedStep& told) { decide_step(state, control.data(), told); }

  std::vector<double> data, control;
  LbfgsScalars state{};
};

constexpr FixedStep kTold{0.5, 1e-8, 0.0, 0.0, 0x1p-23, 3.0, false, 0.0};

FixedStep with_loss(double loss, bool closes_pair) {
  FixedStep told = kTold;
  told.loss = loss, told.closes_pair = closes_pair;
  return told;
}

void check_steps() {
  Ring none(0);
  none[kGradSum] = 4;
  none.decide(kTold);
  CHECK_EQUAL(none[kMove], kGo);
  CHECK_EQUAL(none[kStepLength], 0.125);  // of 1-norm lr
  CHECK_EQUAL(*none.state.array(kCoefG), -1.0);

  Ring full(3);
  full[kCuts] = 2, full[kBadStarts] = 3;
  full.decide(kTold);
  CHECK_EQUAL(full[kStepLength], 0.5);
  CHECK_EQUAL(full[kCuts], 0.0);
  CHECK_EQUAL(full[kBadStarts], 0.0);

  Ring waiting(1);
  waiting[kPairStep] = 1;
  waiting.decide(kTold);
  CHECK_EQUAL(waiting.state[kCount], 2.0);
  CHECK_EQUAL(waiting.state[kOpen], 3.0);
  CHECK_EQUAL(waiting[kPairStep], 0.0);

  Ring uphill(2);
  uphill.state[kGamma] = -9, uphill[kGradSquare] = 100;  // g mostly where H is -9
  uphill.decide(kTold);
  CHECK_EQUAL(uphill.state[kCount], 0.0);
  CHECK_EQUAL(uphill[kResets], 1.0);
  CHECK_EQUAL(*uphill.state.array(kCoefG), -1.0);

  Ring misled(2);
  misled[kReset] = 1;
  misled.decide(kTold);
  CHECK_EQUAL(misled.state[kCount], 0.0);
  CHECK_EQUAL(misled[kReset], 0.0);

  Ring flat(2);
  flat[kGradLargest] = 0, flat[kPairStep] = 0.5;
  flat.decide(kTold);
  CHECK_EQUAL(flat[kMove], kStay);
  CHECK_EQUAL(flat[kPairStep], 0.5);  // kept for the next gradient
}

void check_refusals() {
  for (const std::int64_t count : {0, 2}) {
    Ring ring(count);
    ring[kPairStep] = 0.5;
    for (int starts = 1; starts <= 3; ++starts) {
      ring.decide(with_loss(kNaN, false));
      CHECK_EQUAL(ring[kMove], kStay);
      CHECK_EQUAL(ring[kNonFinite], starts);
    }
    ring.decide(with_loss(kNaN, false));  // too many: back to where the last step began
    CHECK_EQUAL(ring[kMove], kReturn);
    CHECK_EQUAL(ring[kPairStep], 0.0);
    CHECK_EQUAL(ring[kResets], count > 0 ? 1.0 : 0.0);
    CHECK_EQUAL(ring[kStepCuts], count > 0 ? 0.0 : 1.0);
    ring.decide(with_loss(kNaN, false));  // and no further
    CHECK_EQUAL(ring[kMove], kStay);
  }
  Ring ring(0);
  ring.decide(with_loss(kNaN, true));
  CHECK_EQUAL(ring[kNonFinite], 0.0);  // no step has led there
  ring[kPairStep] = 0.5;
  ring.decide(with_loss(kNaN, true));
  CHECK_EQUAL(ring[kNonFinite], 1.0);
  CHECK_EQUAL(ring[kMove], kReturn);
}

// Pairs of other sets decide nothing, and stay.
void check_sets() {
  Ring others(2);
  others.state[kSet] = 1, others[kGradSum] = 4, others[kCuts] = 1;
  others.decide(kTold);
  CHECK_EQUAL(others.state[kUsable], 0.0);
  CHECK_EQUAL(others.state[kCount], 2.0);
  CHECK_EQUAL(*others.state.array(kCoefG), -1.0);
  CHECK_EQUAL(others[kStepLength], 0.25 * kCut * 0.5);
  CHECK_EQUAL(others[kCuts], 1.0);
  others.state[kDirectionDotGrad] = 0;
  note_move(others.state, others.control.data());
  CHECK_EQUAL(others[kReset], 0.0);

  // A step along -g that led nowhere is cut, whatever else the ring holds.
  others[kPairStep] = 0.5, others[kBadStarts] = 3;
  others.decide(with_loss(kNaN, false));
  CHECK_EQUAL(others[kMove], kReturn);
  CHECK_EQUAL(others[kStepCuts], 1.0);
  CHECK_EQUAL(others.state[kCount], 2.0);

  // The pair in waiting becomes one of the present set.
  others[kPairStep] = 1;
  others.decide(kTold);
  CHECK_EQUAL(others.state[kCount], 3.0);
  CHECK_EQUAL(others.state[kUsable], 1.0);
  CHECK_EQUAL(others.state.array(kPairSet)[2], 1.0);
  CHECK_EQUAL(others[kStepLength], 0.5);
  CHECK_EQUAL(slope_to_come(others.state, others.control.data()), -1.0);
  others.state[kSet] = 0;
  others.decide(kTold);
  CHECK_EQUAL(others.state[kUsable], 2.0);

  others[kReset] = 1;
  others.decide(kTold);
  CHECK_EQUAL(others.state[kCount], 0.0);
  CHECK_EQUAL(others.state[kUsable], 0.0);
}

void check_moves() {
  for (const double slope : {-1.0, 0.0, kNaN}) {
    Ring ring(2);
    ring[kMove] = kGo, ring[kStepLength] = 0.25;
    ring.state[kDirectionDotGrad] = slope;
    const MoveOrder order = move_order(ring.state, ring.control.data());
    CHECK_EQUAL(order.stay, !(slope < 0));
    CHECK_EQUAL(order.step, slope < 0 ? 0.25 : 0.0);
    note_move(ring.state, ring.control.data());
    CHECK_EQUAL(ring[kPairStep], slope < 0 ? 0.25 : 0.0);
    CHECK_EQUAL(ring[kReset], slope < 0 ? 0.0 : 1.0);
  }
  Ring back(0);
  back[kMove] = kReturn;
  const MoveOrder order = move_order(back.state, back.control.data());
  CHECK_EQUAL(order.stay, false);
  CHECK_EQUAL(order.save, false);
  CHECK_EQUAL(order.step, 0.0);
}

}  // namespace

int main() {
  check_steps();
  check_refusals();
  check_sets();
  check_moves();
  return check::result();
}
