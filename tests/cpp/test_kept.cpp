// What is kept in device memory, with memory of the host in its place.
#include "cuda/kept.h"

#include <atomic>
#include <memory>
#include <thread>

#include "check.h"

using namespace fuse_ext;

namespace {

struct Place {
  int device, stream;
  unsigned long long capture;

  bool operator==(const Place&) const = default;
  auto operator<=>(const Place&) const = default;
};
using Memory = std::shared_ptr<int>;
using Tables = cuda::SegmentTables<Place, Memory>;

constexpr Place kHere{0, 1, 0};

// A table of so many tensors, whose addresses are told by a number.
std::vector<Segment> table_at(std::uintptr_t number, std::int64_t count = 3) {
  std::vector<Segment> segments(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) {
    segments[i].param = reinterpret_cast<void*>(0x1000 + 16 * i);
    segments[i].grad = reinterpret_cast<void*>((number << 32) + 16 * i);
    segments[i].offset = 4 * i;
    segments[i].numel = 4;
  }
  return segments;
}

struct Uploads {
  Tables& tables;
  int count = 0;

  Memory find(const std::vector<Segment>& segments, const Place& place = kHere,
              bool lasting = false) {
    return tables.find({segments.data(), static_cast<std::int64_t>(segments.size())}, place,
                       lasting, [&] { return std::make_shared<int>(count++); });
  }
};

void check_many_groups() {
  Tables tables(1 << 20);
  Uploads uploads{tables};
  // Of 40 groups, whose gradients move between two places.
  for (int step = 0; step < 10; ++step) {
    for (int group = 0; group < 40; ++group) uploads.find(table_at(2 * group + step % 2));
    CHECK_EQUAL(uploads.count, step == 0 ? 40 : 80);
  }
}

void check_limit() {
  // Small tables count as what an allocation takes at least; the least recently used goes first.
  Tables tables(4 * 512);
  Uploads uploads{tables};
  for (int number = 0; number < 4; ++number) uploads.find(table_at(number));
  uploads.find(table_at(0));
  uploads.find(table_at(4));  // in the place of 1
  CHECK_EQUAL(uploads.count, 5);
  for (int number : {0, 2, 3, 4}) uploads.find(table_at(number));
  CHECK_EQUAL(uploads.count, 5);
  uploads.find(table_at(1));
  CHECK_EQUAL(uploads.count, 6);
  // What is larger than the limit is kept as long as it is the newest.
  const std::vector<Segment> large = table_at(7, 1000);
  uploads.find(large);
  uploads.find(large);
  CHECK_EQUAL(uploads.count, 7);
  uploads.find(table_at(0));
  uploads.find(large);
  CHECK_EQUAL(uploads.count, 9);
}

void check_what_is_equal() {
  Tables tables(1 << 20);
  Uploads uploads{tables};
  std::vector<Segment> segments = table_at(1);
  uploads.find(segments);
  for (int which = 0; which < 6; ++which) {
    std::vector<Segment> other = segments;
    if (which == 0) other[1].weight_decay = 0.1;
    if (which == 1) other[1].lr_scale = 0.5;
    if (which == 2) other[2].numel = 3;
    if (which == 3) other[2].grad = nullptr;
    if (which == 4) other[0].param_dtype = DType::bf16;
    if (which == 5) other.pop_back();
    check::context = "change " + std::to_string(which);
    CHECK_EQUAL(*uploads.find(other), which + 1);
    CHECK_EQUAL(*uploads.find(other), which + 1);
  }
  check::context = "";
  CHECK_EQUAL(*uploads.find(segments), 0);
  // Another stream has a table of its own; a graph's serves all of its device, and stays.
  CHECK_EQUAL(*uploads.find(segments, {0, 2, 0}), 7);
  CHECK_EQUAL(*uploads.find(table_at(2), {0, 2, 5}, true), 8);
  CHECK_EQUAL(*uploads.find(table_at(2), kHere), 8);
  CHECK_EQUAL(*uploads.find(table_at(2), {1, 1, 0}), 9);
}

void check_lasting() {
  Tables tables(0);
  Uploads uploads{tables};
  uploads.find(table_at(0), {0, 1, 5}, true);
  for (int number = 1; number < 50; ++number) uploads.find(table_at(number));
  CHECK_EQUAL(*uploads.find(table_at(0)), 0);
}

// What was found stays whole when another thread's table or workspace takes its place.
void check_held() {
  Tables tables(512);
  Uploads uploads{tables};
  const Memory table = uploads.find(table_at(0));
  CHECK_EQUAL(table.use_count(), 2);
  uploads.find(table_at(1));
  CHECK_EQUAL(table.use_count(), 1);

  cuda::Workspaces<Place, Memory> workspaces;
  int made = 0;
  const auto find = [&](std::size_t bytes, const Place& place) {
    return workspaces.find(bytes, place, [&] { return std::make_shared<int>(made++); });
  };
  const Memory small = find(100, kHere);
  CHECK_EQUAL(*find(50, kHere), 0);
  const Memory large = find(200, kHere);
  CHECK_EQUAL(*large, 1);
  CHECK_EQUAL(*small, 0);
  CHECK_EQUAL(small.use_count(), 1);
  CHECK_EQUAL(*find(200, kHere), 1);
  CHECK_EQUAL(*find(10, {0, 2, 0}), 2);
  // A graph's own, until something else is captured on its stream.
  const Memory captured = find(10, {0, 1, 5});
  CHECK_EQUAL(*captured, 3);
  CHECK_EQUAL(*find(10, {0, 1, 5}), 3);
  find(10, kHere);
  CHECK_EQUAL(captured.use_count(), 1);
}

// Threads that ask for ever larger workspaces on one stream; memory that is given back says so.
void check_threads() {
  using Guarded = std::shared_ptr<std::atomic<int>>;
  cuda::Workspaces<Place, Guarded> workspaces;
  std::atomic<int> given_back_in_use = 0;
  const auto work = [&] {
    for (std::size_t bytes = 1; bytes < 2000; ++bytes) {
      const Guarded mine = workspaces.find(bytes, kHere, [] {
        return Guarded(new std::atomic<int>(0), [](std::atomic<int>* users) {
          *users = -1000000;
          delete users;
        });
      });
      ++*mine;
      if (*mine < 1) ++given_back_in_use;
      --*mine;
    }
  };
  std::thread first(work), second(work);
  first.join();
  second.join();
  CHECK_EQUAL(given_back_in_use.load(), 0);
}

}  // namespace

int main() {
  check_many_groups();
  check_limit();
  check_what_is_equal();
  check_lasting();
  check_held();
  check_threads();
  return check::result();
}
