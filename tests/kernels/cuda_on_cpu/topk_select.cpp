// The kernel as a function of a C library, on pointers of the CPU.
#include "topk_select_sm90.cu"

// Variants of the library; and one of blocks so small that short rows reach all of it.
extern "C" const char* topk_select_on_cpu(const dsv32::TopkSelectArguments* arguments, int cluster_size, int variant,
                                          unsigned seed) {
  using Small = dsv32::topk::Config<64, 1, 512, 256, 128>;
  emulator::random_numbers.seed(seed);
  const auto chosen =
      variant == dsv32::kNumTopkVariants ? dsv32::topk::variant_of<Small>() : dsv32::topk::find_variant(variant);
  return dsv32::topk::describe(dsv32::topk::launch(chosen, *arguments, cluster_size, false, nullptr));
}
