#pragma once

#include <emmintrin.h>

#include <cstdint>
#include <cstring>

#include "core/views.h"

namespace kt::KT_ISA {

// Zeroes memory past the caches: other stores would read it first, which takes twice the time. In SSE2, which
// every x86-64 has. Other threads see the zeros after this thread's next locked instruction, such as the one that
// counts a finished task.
inline void zero_past_caches(char* to, int64_t bytes) {
    constexpr int64_t kVector = 16;
    const int64_t head = smaller(bytes, -reinterpret_cast<intptr_t>(to) & (kVector - 1));
    const int64_t whole = (bytes - head) / kVector * kVector;
    std::memset(to, 0, static_cast<size_t>(head));
    to += head;
    for (int64_t i = 0; i < whole; i += kVector) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_setzero_si128());
    }
    std::memset(to + whole, 0, static_cast<size_t>(bytes - head - whole));
}

}  // namespace kt::KT_ISA
