// The kernel as a function of a C library, on pointers of the CPU.
#include "index_logits_sm90.cu"

extern "C" const char* index_logits_on_cpu(const dsv32::IndexLogitsArguments* arguments, unsigned seed) {
  emulator::random_numbers.seed(seed);
  return dsv32::launch_index_logits(*arguments, nullptr);
}
