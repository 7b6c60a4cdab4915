// The blending ledger's arithmetic over numpy arrays: module megatron_acodm._ledger.
//
// megatron_acodm/blending/mapping.py and quotas.py document every function and hold its numpy twin;
// the two must agree bit for bit. Change them together, and raise SCHEME when results change.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace py = pybind11;

namespace {

constexpr int kScheme = 1;
constexpr int64_t kOne = int64_t{1} << 48;
constexpr uint64_t kGamma = 0x9E3779B97F4A7C15ULL;
constexpr uint64_t kStageStream = 0x5354414745ULL;
constexpr uint64_t kSmallDomain = 16;
constexpr int kRounds = 8;
constexpr int kSmallRounds = 24;
constexpr int64_t kBlock = 512;  // samples handled together

using Int64Array = py::array_t<int64_t, py::array::c_style>;
using Int32Array = py::array_t<int32_t, py::array::c_style>;
using UInt64Array = py::array_t<uint64_t, py::array::c_style>;

inline uint64_t finalize(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  return z ^ (z >> 31);
}

inline uint64_t derive_key(uint64_t seed, uint64_t stream, uint64_t counter) {
  const uint64_t key = finalize(finalize(seed + kGamma) ^ stream);
  return finalize((key + kGamma) ^ counter);
}

inline uint64_t round_function(uint64_t half, uint64_t key) {
  uint64_t h = (half ^ key) * 0xBF58476D1CE4E5B9ULL;
  h = (h ^ (h >> 32)) * 0x94D049BB133111EBULL;
  return h >> 32;
}

// A pseudo-random permutation of [0, n): a Feistel network on the smallest power of two that
// holds n, applied until the value lands below n (fewer than two times on average).
class Permutation {
 public:
  Permutation() = default;

  Permutation(uint64_t n, uint64_t key) : n_(n) {
    const int bits = n > 1 ? 64 - __builtin_clzll(n - 1) : 0;
    shift_ = bits / 2;
    low_mask_ = (uint64_t{1} << shift_) - 1;
    high_mask_ = (uint64_t{1} << (bits - shift_)) - 1;
    small_ = n <= kSmallDomain;
    for (int i = 0; i < (small_ ? kSmallRounds : kRounds); ++i) {
      keys_[i] = finalize(key + (i + 1) * kGamma);
    }
  }

  uint64_t size() const { return n_; }

  // One application of the network.
  uint64_t step(uint64_t x) const {
    return small_ ? network<kSmallRounds>(x) : network<kRounds>(x);
  }

 private:
  template <int rounds>
  uint64_t network(uint64_t x) const {
    uint64_t low = x & low_mask_;
    uint64_t high = x >> shift_;
    for (int i = 0; i < rounds; i += 2) {
      high ^= round_function(low, keys_[i]) & high_mask_;
      low ^= round_function(high, keys_[i + 1]) & low_mask_;
    }
    return (high << shift_) | low;
  }

  uint64_t n_ = 1;
  uint64_t low_mask_ = 0;
  uint64_t high_mask_ = 0;
  int shift_ = 0;
  bool small_ = true;
  uint64_t keys_[kSmallRounds] = {};
};

// Permutes a block of values, each by its own permutation (permutation_of(i) for values[i]).
// Values that must be walked further are collected without a branch and done in the next round:
// a loop for each value would be mispredicted half of the time.
template <typename PermutationOf>
void permute_block(uint64_t* values, size_t count, const PermutationOf& permutation_of) {
  uint32_t todo[kBlock];
  for (size_t i = 0; i < count; ++i) todo[i] = static_cast<uint32_t>(i);
  while (count > 0) {
    size_t left = 0;
    for (size_t j = 0; j < count; ++j) {
      const uint32_t i = todo[j];
      const Permutation& permutation = permutation_of(i);
      values[i] = permutation.step(values[i]);
      todo[left] = i;
      left += values[i] >= permutation.size();
    }
    count = left;
  }
}

// One stage, unpacked from its row and the row before it.
class Stage {
 public:
  Stage(int64_t num_domains, int64_t granule_size)
      : granule_size_(granule_size), ends_(num_domains) {}

  bool contains(int64_t index) const { return first_ <= index && index < end_; }

  void load(const int64_t* before, const int64_t* after, uint64_t key) {
    const size_t num_domains = ends_.size();
    first_ = before[0];
    end_ = after[0];
    cursor_ = before + 1 + num_domains;
    int64_t total = 0;
    for (size_t k = 0; k < num_domains; ++k) {
      total += after[1 + num_domains + k] - cursor_[k];
      ends_[k] = total;
    }
    permutation_ = Permutation((end_ - first_) / granule_size_, key);
  }

  // Locates up to kBlock samples of this stage.
  void locate(const int64_t* indices, size_t count, int32_t* domains, int64_t* positions) const {
    uint64_t ranks[kBlock];       // of the granules met, in the order of the domains
    uint32_t granule_of[kBlock];  // of each sample, an index into ranks
    size_t num_granules = 0;
    int64_t last_slot = -1;
    for (size_t i = 0; i < count; ++i) {
      const int64_t slot = (indices[i] - first_) / granule_size_;
      positions[i] = indices[i] - first_ - slot * granule_size_;
      if (slot != last_slot) ranks[num_granules++] = static_cast<uint64_t>(slot);
      last_slot = slot;
      granule_of[i] = static_cast<uint32_t>(num_granules - 1);
    }
    permute_block(ranks, num_granules,
                  [&](uint32_t) -> const Permutation& { return permutation_; });
    int32_t granule_domain[kBlock];
    int64_t granule_start[kBlock];
    for (size_t i = 0; i < num_granules; ++i) {
      const int64_t rank = static_cast<int64_t>(ranks[i]) * granule_size_;  // in samples
      const size_t domain = domain_of(rank);
      granule_domain[i] = static_cast<int32_t>(domain);
      granule_start[i] = cursor_[domain] + rank - (domain > 0 ? ends_[domain - 1] : 0);
    }
    for (size_t i = 0; i < count; ++i) {
      domains[i] = granule_domain[granule_of[i]];
      positions[i] += granule_start[granule_of[i]];
    }
  }

 private:
  // The first domain that ends after rank; branch-free, as ranks come at random.
  size_t domain_of(int64_t rank) const {
    const int64_t* ends = ends_.data();
    size_t low = 0;
    for (size_t count = ends_.size(); count > 1;) {
      const size_t half = count / 2;
      low += ends[low + half - 1] <= rank ? half : 0;
      count -= half;
    }
    return low;
  }

  int64_t granule_size_;
  std::vector<int64_t> ends_;  // samples of the stage in domains 0..k
  const int64_t* cursor_ = nullptr;
  int64_t first_ = 0;
  int64_t end_ = 0;
  Permutation permutation_;
};

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

py::tuple locate(const Int64Array& rows, int64_t base_stage, int64_t granule_size, uint64_t seed,
                 const Int64Array& indices) {
  require(rows.ndim() == 2 && rows.shape(0) >= 2 && rows.shape(1) >= 4 && rows.shape(1) % 2 == 0,
          "rows must be [stages + 1, 2 * domains + 2] with at least one stage");
  require(indices.ndim() == 1, "indices must be one-dimensional");
  require(granule_size >= 1, "granule_size must be at least 1");
  const int64_t num_stages = rows.shape(0) - 1;
  const int64_t width = rows.shape(1);
  const int64_t count = indices.shape(0);
  Int32Array domains(count);
  Int64Array positions(count);
  const int64_t* row = rows.data();
  const int64_t* index = indices.data();
  int32_t* domain = domains.mutable_data();
  int64_t* position = positions.mutable_data();
  bool inside = true;
  {
    py::gil_scoped_release release;
    Stage stage((width - 2) / 2, granule_size);
    for (int64_t begin = 0, end = 0; begin < count; begin = end) {
      if (!stage.contains(index[begin])) {
        inside = row[0] <= index[begin] && index[begin] < row[num_stages * width];
        if (!inside) break;
        int64_t low = 0;  // becomes the last row that ends at or before the sample
        for (int64_t high = num_stages; high - low > 1;) {
          const int64_t middle = (low + high) / 2;
          (row[middle * width] <= index[begin] ? low : high) = middle;
        }
        stage.load(row + low * width, row + (low + 1) * width,
                   derive_key(seed, kStageStream, base_stage + low));
      }
      end = begin + 1;
      while (end < count && end - begin < kBlock && stage.contains(index[end])) ++end;
      stage.locate(index + begin, end - begin, domain + begin, position + begin);
    }
  }
  require(inside, "an index lies outside the stages given");
  return py::make_tuple(domains, positions);
}

// The epoch that a domain is in, while samples are walked through in order.
struct Epoch {
  int64_t begin = 0;  // positions [begin, end)
  int64_t end = 0;
  int64_t number = 0;
  Permutation permutation;
};

py::tuple epoch_and_index(const Int32Array& domains, const Int64Array& positions,
                          const Int64Array& sizes, const UInt64Array& streams, uint64_t seed) {
  require(domains.ndim() == 1 && positions.ndim() == 1 && domains.shape(0) == positions.shape(0),
          "domains and positions must be one-dimensional and of one length");
  require(sizes.ndim() == 1 && streams.ndim() == 1 && sizes.shape(0) == streams.shape(0),
          "sizes and streams must be one-dimensional and of one length");
  const int64_t count = domains.shape(0);
  const int64_t num_domains = sizes.shape(0);
  Int64Array epochs(count);
  Int64Array indices(count);
  const int32_t* domain = domains.data();
  const int64_t* position = positions.data();
  const int64_t* size = sizes.data();
  const uint64_t* stream = streams.data();
  int64_t* epoch = epochs.mutable_data();
  int64_t* index = indices.mutable_data();
  bool valid = true;
  {
    py::gil_scoped_release release;
    std::vector<Epoch> current(num_domains);
    uint64_t ranks[kBlock];
    int64_t begin = 0;  // samples [begin, i) wait in ranks for their permutation
    const auto flush = [&](int64_t end) {
      permute_block(ranks, end - begin, [&](uint32_t j) -> const Permutation& {
        return current[domain[begin + j]].permutation;
      });
      std::copy(ranks, ranks + (end - begin), index + begin);
      begin = end;
    };
    for (int64_t i = 0; i < count; ++i) {
      const int32_t k = domain[i];
      valid = k >= 0 && k < num_domains && position[i] >= 0 && size[k] >= 1;
      if (!valid) break;
      Epoch& now = current[k];
      if (position[i] < now.begin || position[i] >= now.end) {
        flush(i);  // the waiting samples may need the permutation that is replaced here
        now.number = position[i] / size[k];
        now.begin = now.number * size[k];
        now.end = now.begin + size[k];
        now.permutation = Permutation(size[k], derive_key(seed, stream[k], now.number));
      } else if (i - begin == kBlock) {
        flush(i);
      }
      epoch[i] = now.number;
      ranks[i - begin] = static_cast<uint64_t>(position[i] - now.begin);
    }
    if (valid) flush(count);
  }
  require(valid, "a domain or position is out of range");
  return py::make_tuple(epochs, indices);
}

py::tuple apportion(const Int64Array& units, int64_t num_granules, const Int64Array& carry,
                    int64_t minimum, const Int64Array& limits) {
  require(units.ndim() == 1 && carry.ndim() == 1 && limits.ndim() == 1 &&
              units.shape(0) == carry.shape(0) && units.shape(0) == limits.shape(0),
          "units, carry and limits must be one-dimensional and of one length");
  const int64_t num_domains = units.shape(0);
  const int64_t* unit = units.data();
  const int64_t* limit = limits.data();
  int64_t reserved = 0;  // granules that must still go to domains below their minimum
  int64_t room = 0;
  for (int64_t k = 0; k < num_domains; ++k) {
    if (unit[k] == 0) continue;
    reserved += std::min(minimum, limit[k]);
    room += std::min(num_granules, limit[k]);
  }
  require(reserved <= num_granules, "the minimum adds up to more than the granules");
  require(room >= num_granules, "the domains with a weight have not enough granules left");
  Int64Array quota_array(num_domains);
  Int64Array carry_array(num_domains);
  int64_t* quota = quota_array.mutable_data();
  int64_t* due = carry_array.mutable_data();
  std::fill(quota, quota + num_domains, 0);
  std::copy(carry.data(), carry.data() + num_domains, due);
  {
    py::gil_scoped_release release;
    // The granule by which a domain that is not served falls one granule behind.
    std::vector<int64_t> deadline(num_domains);
    const auto set_deadline = [&](int64_t k, int64_t granule) {
      const bool late = due[k] >= kOne || unit[k] == 0;
      deadline[k] = late ? 0 : granule + (kOne - 1 - due[k]) / unit[k];
    };
    for (int64_t k = 0; k < num_domains; ++k) set_deadline(k, -1);
    for (int64_t granule = 0; granule < num_granules; ++granule) {
      const bool reserved_only = reserved == num_granules - granule;
      int64_t best = -1;
      int best_class = 3;
      int64_t best_key = 0;
      for (int64_t k = 0; k < num_domains; ++k) {
        if (unit[k] == 0) continue;
        due[k] += unit[k];
        if (quota[k] >= (reserved_only ? std::min(minimum, limit[k]) : limit[k])) continue;
        const int urgency = due[k] >= kOne ? 0 : due[k] > 0 ? 1 : 2;
        const int64_t key = urgency == 1 ? deadline[k] : -due[k];
        if (urgency < best_class || (urgency == best_class && key < best_key)) {
          best = k;
          best_class = urgency;
          best_key = key;
        }
      }
      due[best] -= kOne;
      set_deadline(best, granule);
      reserved -= quota[best] < minimum;
      ++quota[best];
    }
  }
  return py::make_tuple(quota_array, carry_array);
}

}  // namespace

PYBIND11_MODULE(_ledger, module) {
  module.doc() = "Compiled twins of megatron_acodm.blending.mapping and quotas";
  module.attr("SCHEME") = kScheme;
  module.def("locate", &locate, py::arg("rows").noconvert(), py::arg("base_stage"),
             py::arg("granule_size"), py::arg("seed"), py::arg("indices").noconvert());
  module.def("epoch_and_index", &epoch_and_index, py::arg("domains").noconvert(),
             py::arg("positions").noconvert(), py::arg("sizes").noconvert(),
             py::arg("streams").noconvert(), py::arg("seed"));
  module.def("apportion", &apportion, py::arg("units").noconvert(), py::arg("num_granules"),
             py::arg("carry").noconvert(), py::arg("minimum"), py::arg("limits").noconvert());
}
