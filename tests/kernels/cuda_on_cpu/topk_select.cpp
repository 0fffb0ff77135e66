// The kernel as a function of a C library, on pointers of the CPU.
#include "topk_select_sm90.cu"

// With the blocks of the library; or with blocks so small that short rows reach all of it.
extern "C" const char* topk_select_on_cpu(const dsv32::TopkSelectArguments* arguments, int cluster_size, bool small,
                                          unsigned seed) {
  using Small = dsv32::topk::Config<64, 512, 256, 128>;
  emulator::random_numbers.seed(seed);
  return small ? dsv32::topk::launch<Small>(*arguments, cluster_size, nullptr)
               : dsv32::launch_topk_select(*arguments, cluster_size, nullptr);
}
