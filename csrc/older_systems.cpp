// Lets the libraries load wherever PyTorch does: on glibc 2.28 and the libstdc++ of gcc 8 (manylinux_2_28). A newer
// compiler calls a few functions that these do not have. They are defined here, so that no library asks the system.
#define _GLIBCXX_EXTERN_TEMPLATE 0  // also compile the templates that libstdc++ has compiled, in this file only
#include <new>
#include <sstream>

#ifdef __GLIBCXX__
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

namespace std {
void __throw_bad_array_new_length() {  // since gcc 11
  throw bad_array_new_length();
}
}  // namespace std
#endif

// Since glibc 2.32: whether the process has one thread. With 0, std::shared_ptr always counts atomically.
extern "C" {
extern char __libc_single_threaded;
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
