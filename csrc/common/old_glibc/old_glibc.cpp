// What code compiled against a new C and C++ library wants of it at run time, for wheels that also load where
// those are older (tools/wheel/old_glibc.py). Everything here stays in its binary: nothing is exported.
#include <new>
#include <sstream>

// glibc 2.32 says by it whether there is one thread yet; libstdc++ then counts references without atomics.
// No: they are always atomic.
extern "C" {
extern char __libc_single_threaded;
char __libc_single_threaded = 0;
}

namespace std {

// GLIBCXX_3.4.29
void __throw_bad_array_new_length() { throw bad_array_new_length(); }

// GLIBCXX_3.4.26
template basic_ostringstream<char>::basic_ostringstream();
template basic_stringstream<char>::basic_stringstream();

}  // namespace std
