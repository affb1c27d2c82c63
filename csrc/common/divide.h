// Division by a number that the host knows, without the hundred cycles of an integer division.
#pragma once

#include <cstdint>

namespace hfp {

// Exact for dividends below 2^31: q = floor(n m / 2^(31 + l)), l = ceil(log2 d), m = ceil(2^(31 + l) / d) < 2^32.
// (Granlund and Montgomery, "Division by invariant integers using multiplication", PLDI 1994.)
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(uint32_t d) : divisor_(d) {
    while ((uint64_t{1} << log_) < d) ++log_;
    multiplier_ = static_cast<uint32_t>(((uint64_t{1} << (31 + log_)) + d - 1) / d);
  }
  __device__ uint32_t divisor() const { return divisor_; }
  __device__ uint32_t divide(uint32_t n) const { return log_ == 0 ? n : __umulhi(n, multiplier_) >> (log_ - 1); }
  // Returns the quotient, leaves the remainder.
  __device__ uint32_t divide(uint32_t n, uint32_t& remainder) const {
    const uint32_t q = divide(n);
    remainder = n - q * divisor_;
    return q;
  }

 private:
  uint32_t divisor_ = 1;
  uint32_t multiplier_ = 0;
  uint32_t log_ = 0;
};

}  // namespace hfp
