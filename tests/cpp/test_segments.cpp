// The segment table: every piece of a range exactly once, in order, whatever the gaps.
#include "segments.h"

#include <vector>

#include "check.h"

using namespace fuse_ext;

namespace {

struct Piece {
  std::int64_t segment, first, at, length;
};

std::vector<Piece> pieces(const SegmentTable& table, std::int64_t begin, std::int64_t end) {
  std::vector<Piece> found;
  table.for_each_piece(
      begin, end,
      [&](const Segment& segment, std::int64_t first, std::int64_t at, std::int64_t length) {
    found.push_back({&segment - table.segments, first, at, length});
  });
  return found;
}

std::vector<Segment> segments_at(const std::vector<std::pair<std::int64_t, std::int64_t>>& places) {
  std::vector<Segment> segments;
  for (const auto& [offset, numel] : places) {
    Segment segment{};
    segment.offset = offset;
    segment.numel = numel;
    segments.push_back(segment);
  }
  return segments;
}

// Compares every range with a table that says for each flat index which element lies there.
void check_all_ranges(const std::vector<Segment>& segments, std::int64_t numel) {
  const SegmentTable table{segments.data(), static_cast<std::int64_t>(segments.size())};
  for (std::int64_t begin = 0; begin <= numel; ++begin) {
    const std::int64_t found = table.first_ending_after(begin);
    for (std::int64_t i = 0; i < table.count; ++i) {
      const bool ends_after = segments[i].offset + segments[i].numel > begin;
      CHECK(ends_after == (i >= found));
    }
    for (std::int64_t end = begin; end <= numel; ++end) {
      std::vector<int> seen(static_cast<std::size_t>(numel), 0);
      std::int64_t last = begin;
      for (const Piece& piece : pieces(table, begin, end)) {
        const Segment& segment = segments[piece.segment];
        CHECK(piece.length > 0);
        CHECK(piece.at >= last && piece.at + piece.length <= end);
        CHECK_EQUAL(piece.at - piece.first, segment.offset);
        CHECK(piece.first >= 0 && piece.first + piece.length <= segment.numel);
        last = piece.at + piece.length;
        for (std::int64_t i = piece.at; i < last; ++i) ++seen[i];
      }
      for (std::int64_t i = 0; i < numel; ++i) {
        bool covered = false;
        for (const Segment& segment : segments) {
          covered |= segment.offset <= i && i < segment.offset + segment.numel;
        }
        CHECK_EQUAL(seen[i], covered && begin <= i && i < end);
      }
    }
  }
}

}  // namespace

int main() {
  check_all_ranges({}, 5);
  check_all_ranges(segments_at({{0, 12}}), 12);
  check_all_ranges(segments_at({{0, 1}, {1, 1}, {2, 1}, {3, 7}}), 10);
  check_all_ranges(segments_at({{2, 3}, {5, 1}, {9, 4}}), 16);
  // Zero-element segments have no piece.
  check_all_ranges(segments_at({{0, 0}, {0, 4}, {4, 0}, {4, 0}, {6, 2}, {8, 0}}), 9);
  check::Random random(1);
  for (int round = 0; round < 20; ++round) {
    std::vector<std::pair<std::int64_t, std::int64_t>> places;
    std::int64_t at = 0;
    for (int i = 0; i < 10; ++i) {
      at += random.below(3);
      const std::int64_t numel = random.below(4);
      places.push_back({at, numel});
      at += numel;
    }
    check_all_ranges(segments_at(places), at + 2);
  }
  // Far beyond 32 bits.
  const std::int64_t far = std::int64_t{1} << 40;
  const std::vector<Segment> segments = segments_at({{0, far}, {far, 3}, {far + 10, far}});
  const std::vector<Piece> found = pieces({segments.data(), 3}, far - 1, far + 12);
  CHECK_EQUAL(found.size(), 3);
  CHECK_EQUAL(found[0].first, far - 1);
  CHECK_EQUAL(found[1].length, 3);
  CHECK_EQUAL(found[2].at, far + 10);
  CHECK_EQUAL(found[2].length, 2);
  return check::result();
}
