#pragma once

#include <emmintrin.h>

#include <cstdint>
#include <cstring>

#include "core/views.h"

namespace kt::KT_ISA {

// Zeroes memory with stores that bypass the caches; ordinary stores read each line first. Uses SSE2, which every x86-64
// CPU has. Other threads are sure to see the zeros only after this thread's next locked instruction, such as the one
// that counts its finished tasks (parallel/schedule.h).
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
