// Lets the libraries load on every system that PyTorch supports, down to glibc 2.28 and the libstdc++ of gcc 8
// (manylinux_2_28). Code from a newer compiler calls a few functions that these lack. This file defines them, so no
// library needs them from the system.
// In this file, instantiate even the templates that libstdc++ already contains.
#define _GLIBCXX_EXTERN_TEMPLATE 0
#include <exception>
#include <new>
#include <sstream>

#if defined(_GLIBCXX_RELEASE) && _GLIBCXX_RELEASE >= 11 && _GLIBCXX_RELEASE <= 14
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

// called by code that gcc 11 or newer compiles
void std::__throw_bad_array_new_length() {
  throw std::bad_array_new_length();
}

// Also called since gcc 11, by the inline copy constructor and destructor of std::exception_ptr. Every libstdc++
// contains compiled versions of these two.
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

// A flag of glibc 2.32 and newer that says whether the process has only one thread. While it is 0, std::shared_ptr
// always counts atomically.
extern "C" {
extern char __libc_single_threaded;
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
