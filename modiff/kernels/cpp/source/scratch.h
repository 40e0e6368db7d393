// Memory that a thread keeps between calls: fresh memory would cost a page fault for every 4 KiB.
#pragma once
#include <cstdlib>
#include <new>

namespace modiff {

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  ~Buffer() { free(data); }
  template <class T>
  T* get(int64_t count) {
    const size_t wanted = ((size_t)count * sizeof(T) + 4095) / 4096 * 4096 + 4096;
    if (size < wanted) {
      free(data);
      data = aligned_alloc(4096, wanted);
      size = data ? wanted : 0;
      if (!data) throw std::bad_alloc();
    }
    return (T*)data;
  }
};

}  // namespace modiff
