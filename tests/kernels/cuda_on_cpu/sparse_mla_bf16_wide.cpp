// The kernel as a function of a C library, on pointers of the CPU.
#include "sparse_mla_bf16_wide_sm90.cu"

extern "C" const char* sparse_mla_bf16_wide_on_cpu(const dsv32::SparseMlaArguments* arguments, int num_splits,
                                                   unsigned seed) {
  emulator::random_numbers.seed(seed);
  return dsv32::launch_sparse_mla_bf16_wide(*arguments, num_splits, nullptr);
}
