// The kernel as a function of a C library, on pointers of the CPU.
#include "latent_pages_sm90.cu"

extern "C" const char* latent_pages_on_cpu(const dsv32::LatentPagesArguments* arguments, unsigned seed) {
  emulator::random_numbers.seed(seed);
  return dsv32::launch_latent_pages(*arguments, nullptr);
}
