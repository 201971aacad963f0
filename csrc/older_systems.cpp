// Lets the libraries load wherever PyTorch does: on glibc 2.28 and the libstdc++ of gcc 8 (manylinux_2_28). A newer
// compiler calls a few functions that these do not have. They are defined here, so that no library asks the
// system for them.
#define _GLIBCXX_EXTERN_TEMPLATE 0  // also compile the templates that libstdc++ has compiled, in this file only
#include <exception>
#include <new>
#include <sstream>

#if defined(_GLIBCXX_RELEASE) && _GLIBCXX_RELEASE >= 11 && _GLIBCXX_RELEASE <= 14
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

// used since gcc 11
void std::__throw_bad_array_new_length() {
  throw std::bad_array_new_length();
}

// also since gcc 11, by the inline copy and destructor of std::exception_ptr; every libstdc++ has those two compiled
extern "C" {
void copy_exception_ptr(void* self, const void* other) noexcept
    __asm__("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void destroy_exception_ptr(void* self) noexcept __asm__("_ZNSt15__exception_ptr13exception_ptrD1Ev");
}

void std::__exception_ptr::exception_ptr::_M_addref() noexcept {
  void* never_destroyed;
  copy_exception_ptr(&never_destroyed, this);
}

void std::__exception_ptr::exception_ptr::_M_release() noexcept {
  destroy_exception_ptr(&_M_exception_object);
  _M_exception_object = nullptr;
}
#endif

// Since glibc 2.32: whether the process has one thread. With 0, std::shared_ptr always counts atomically.
extern "C" {
extern char __libc_single_threaded;
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
