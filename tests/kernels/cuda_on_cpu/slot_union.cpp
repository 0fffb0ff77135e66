// The kernel as a function of a C library, on pointers of the CPU.
#include "slot_union_sm90.cu"

extern "C" const char* slot_union_on_cpu(const dsv32::SlotUnionArguments* arguments, unsigned seed) {
  emulator::random_numbers.seed(seed);
  return dsv32::launch_slot_union(*arguments, nullptr);
}
