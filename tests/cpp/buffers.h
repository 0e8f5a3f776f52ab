// Inputs for the kernels' tests: guarded memory of any number format, and tensors laid end to end.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "check.h"
#include "segments.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FUSE_TEST_ASAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define FUSE_TEST_ASAN 1
#endif

namespace check {

using fuse_ext::DType;

inline constexpr DType kDTypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

inline std::size_t bytes_of(DType dtype) { return static_cast<std::size_t>(size_of(dtype)); }

inline const char* name_of(DType dtype) {
  const char* names[] = {"f32", "f64", "bf16", "f16"};
  return names[static_cast<int>(dtype)];
}

template <class T>
constexpr DType dtype_of() {
  return sizeof(T) == sizeof(float) ? DType::f32 : DType::f64;
}

// numel elements, aligned as an element but not as a vector, between zones that nothing may
// write and whose values, NaN in every format, spoil whatever reads them. The address sanitizer
// guards the ends itself, also against reads.
class Buffer {
 public:
  Buffer(DType dtype, std::int64_t numel)
      : dtype_(dtype),
        numel_(numel),
        bytes_(static_cast<std::size_t>(numel) * bytes_of(dtype)),
        memory_(new unsigned char[kZone + bytes_ + kEnd]) {
    std::memset(memory_.get(), 0xff, kZone + bytes_ + kEnd);
    begin_ = memory_.get() + kZone;
  }

  void* data() { return begin_; }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(begin_);
  }
  std::int64_t numel() const { return numel_; }
  DType dtype() const { return dtype_; }

  double get(std::int64_t i) const {
    const void* at = begin_ + static_cast<std::size_t>(i) * bytes_of(dtype_);
    switch (dtype_) {
      case DType::f32: return fuse_ext::load<double>(read<float>(at));
      case DType::f64: return read<double>(at);
      case DType::bf16: return fuse_ext::load<double>(read<fuse_ext::BFloat16>(at));
      case DType::i8: return read<std::int8_t>(at);
      default: return fuse_ext::load<double>(read<fuse_ext::Float16>(at));
    }
  }

  void set(std::int64_t i, double value) {
    void* at = begin_ + static_cast<std::size_t>(i) * bytes_of(dtype_);
    switch (dtype_) {
      case DType::f32: write<float>(at, value); break;
      case DType::f64: write<double>(at, value); break;
      case DType::bf16: write<fuse_ext::BFloat16>(at, value); break;
      case DType::i8: *static_cast<std::int8_t*>(at) = static_cast<std::int8_t>(value); break;
      default: write<fuse_ext::Float16>(at, value);
    }
  }

  void fill(const std::vector<double>& values) {
    for (std::int64_t i = 0; i < numel_; ++i) set(i, values[static_cast<std::size_t>(i)]);
  }

  // Every element is the expected one, NaN where that is expected, and the zones are untouched.
  void expect(const char* name, const std::vector<double>& values) const {
    for (std::int64_t i = 0; i < numel_; ++i) {
      const double expected = values[static_cast<std::size_t>(i)];
      if (get(i) == expected || (std::isnan(expected) && std::isnan(get(i)))) continue;
      failed(__FILE__, __LINE__,
             std::string(name) + "[" + std::to_string(i) + "] is " + text(get(i)) + ", not " +
                 text(expected));
      return;
    }
    expect_zones(name);
  }

  void expect_zones(const char* name) const {
    for (const unsigned char* at = memory_.get(); at < memory_.get() + kZone + bytes_ + kEnd;
         ++at) {
      const bool inside = at >= begin_ && at < begin_ + bytes_;
      if (inside || *at == 0xff) continue;
      failed(__FILE__, __LINE__, std::string("written out of the bounds of ") + name);
      return;
    }
  }

 private:
#if defined(FUSE_TEST_ASAN)
  static constexpr std::size_t kZone = 8, kEnd = 0;
#else
  static constexpr std::size_t kZone = 264, kEnd = 256;
#endif

  template <class Number>
  static Number read(const void* at) {
    Number number;
    std::memcpy(&number, at, sizeof number);
    return number;
  }
  template <class Number>
  static void write(void* at, double value) {
    Number number;
    fuse_ext::store(&number, value);
    std::memcpy(at, &number, sizeof number);
  }

  DType dtype_;
  std::int64_t numel_;
  std::size_t bytes_;
  std::unique_ptr<unsigned char[]> memory_;
  unsigned char* begin_;
};

// Integers -1, 1 and 2: sums and products of the kernels are exact in every format.
inline std::vector<double> integers(Random& random, std::int64_t numel) {
  constexpr double kValues[] = {-1, 1, 2};
  std::vector<double> values(static_cast<std::size_t>(numel));
  for (double& value : values) value = kValues[random.below(3)];
  return values;
}

// Tensors of all formats laid end to end with gaps, and what lies at each flat index.
class Tensors {
 public:
  Tensors(Random& random, std::int64_t numel, int pieces, bool gaps, bool with_f64)
      : numel_(numel),
        x(zeros(numel)),
        grad(zeros(numel)),
        decay(zeros(numel)),
        share(zeros(numel, 1.0)),
        covered(zeros(numel)) {
    std::int64_t at = 0;
    for (int i = 0; i < pieces && at < numel; ++i) {
      if (gaps) at += random.below(4) == 0 ? random.below(numel - at) : 0;
      const std::int64_t left = numel - at;
      const std::int64_t length = i + 1 == pieces && !gaps ? left : random.below(left + 1);
      add(random, at, length, with_f64);
      at += length;
    }
  }

  fuse_ext::SegmentTable table() const {
    return {segments_.data(), static_cast<std::int64_t>(segments_.size())};
  }

  // g = sign * grad + decay * x.
  std::vector<double> effective(double sign) const {
    std::vector<double> g = zeros(numel_);
    for (std::size_t i = 0; i < g.size(); ++i) g[i] = sign * grad[i] + decay[i] * x[i];
    return g;
  }

  // Checks the parameters against flat values, as their formats hold them.
  void expect_params(const std::vector<double>& flat) const { expect("param", params_, flat); }
  void expect_grads(const std::vector<double>& flat) const { expect("grad", grads_, flat); }

  // New values for the parameters; x takes the covered ones.
  void set_params(const std::vector<double>& flat) {
    for (std::size_t s = 0; s < segments_.size(); ++s) {
      for (std::int64_t i = 0; i < segments_[s].numel; ++i) {
        const auto at = static_cast<std::size_t>(segments_[s].offset + i);
        params_[s]->set(i, flat[at]);
        x[at] = flat[at];
      }
    }
  }

 private:
  static std::vector<double> zeros(std::int64_t numel, double value = 0.0) {
    return std::vector<double>(static_cast<std::size_t>(numel), value);
  }

  void add(Random& random, std::int64_t offset, std::int64_t length, bool with_f64) {
    DType formats[2];
    for (DType& format : formats) {
      do {
        format = kDTypes[random.below(4)];
      } while (format == DType::f64 && !with_f64);
    }
    params_.push_back(std::make_unique<Buffer>(formats[0], length));
    grads_.push_back(std::make_unique<Buffer>(formats[1], length));
    params_.back()->fill(integers(random, length));
    grads_.back()->fill(integers(random, length));
    fuse_ext::Segment segment{};
    segment.param = params_.back()->data();
    segment.grad = grads_.back()->data();
    segment.offset = offset;
    segment.numel = length;
    segment.weight_decay = random.below(2) == 0 ? 0.0 : 2.0;
    segment.lr_scale = random.below(2) == 0 ? 1.0 : 2.0;
    segment.param_dtype = formats[0];
    segment.grad_dtype = formats[1];
    segments_.push_back(segment);
    for (std::int64_t i = 0; i < length; ++i) {
      const auto at = static_cast<std::size_t>(offset + i);
      x[at] = params_.back()->get(i);
      grad[at] = grads_.back()->get(i);
      decay[at] = segment.weight_decay;
      share[at] = segment.lr_scale;
      covered[at] = 1;
    }
  }

  void expect(const char* name, const std::vector<std::unique_ptr<Buffer>>& buffers,
              const std::vector<double>& flat) const {
    for (std::size_t s = 0; s < segments_.size(); ++s) {
      Buffer rounded(buffers[s]->dtype(), segments_[s].numel);
      std::vector<double> values;
      for (std::int64_t i = 0; i < segments_[s].numel; ++i) {
        rounded.set(i, flat[static_cast<std::size_t>(segments_[s].offset + i)]);
        values.push_back(rounded.get(i));
      }
      buffers[s]->expect(name, values);
    }
  }

  std::int64_t numel_;
  std::vector<fuse_ext::Segment> segments_;
  std::vector<std::unique_ptr<Buffer>> params_, grads_;

 public:
  std::vector<double> x, grad, decay, share, covered;  // per flat index; 0, but share 1, in gaps
};

}  // namespace check
