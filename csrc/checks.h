// Errors that say what was expected and what came.
#pragma once

#include <sstream>
#include <stdexcept>

namespace dsv32 {

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }
}

}  // namespace dsv32
