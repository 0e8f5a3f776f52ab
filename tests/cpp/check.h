// What the C++ tests need of a test framework: checks that go on, and an exit code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>

namespace check {

inline int failures = 0;
inline std::string context;  // what is being tested, printed with a failure

inline void failed(const char* file, int line, const std::string& what) {
  if (++failures > 20) return;
  std::printf("%s:%d: %s%s%s\n", file, line, what.c_str(), context.empty() ? "" : " in ",
              context.c_str());
}

inline std::string text(double value) {
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, "%.17g", value);
  return buffer;
}

inline void equal(const char* file, int line, const char* what, double actual, double expected) {
  if (actual == expected) return;
  failed(file, line, std::string(what) + " is " + text(actual) + ", not " + text(expected));
}

inline void near(const char* file, int line, const char* what, double actual, double expected,
                 double error) {
  if (std::fabs(actual - expected) <= error) return;
  failed(file, line,
         std::string(what) + " is " + text(actual) + ", not within " + text(error) + " of " +
             text(expected));
}

// For main: 0 when all went well.
inline int result() {
  if (failures > 0) std::printf("%d checks failed\n", failures);
  return failures > 0;
}

// A small generator: the same numbers on every platform.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 2654435769u + 1) {}

  std::uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<std::uint32_t>(state_ >> 32);
  }
  std::int64_t below(std::int64_t limit) { return bits() % limit; }
  double uniform() { return bits() * 0x1p-32; }
  // Bell-shaped enough: mean 0, variance 1.
  double normal() {
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }

 private:
  std::uint64_t state_;
};

}  // namespace check

#define CHECK(condition) \
  ((condition) ? void() : check::failed(__FILE__, __LINE__, "not true: " #condition))
#define CHECK_EQUAL(actual, expected)                                    \
  check::equal(__FILE__, __LINE__, #actual, static_cast<double>(actual), \
               static_cast<double>(expected))
#define CHECK_NEAR(actual, expected, error) \
  check::near(__FILE__, __LINE__, #actual, actual, expected, error)
