// The kernel as a function of a C library, on pointers of the CPU.
#include "sparse_mla_bf16_union_sm90.cu"

extern "C" const char* sparse_mla_bf16_union_on_cpu(const dsv32::SparseMlaArguments* arguments, const void* seen,
                                                    unsigned seed) {
  emulator::random_numbers.seed(seed);
  return dsv32::launch_sparse_mla_bf16_union(*arguments, seen, nullptr);
}
