// Runs both passes of kt::Workspace. Exit status 1: an array of the counting pass is not null; 2: an array of the
// second pass is not aligned, or overlaps another. Prints the error for an array that was not counted.

#include "core/workspace.h"

#include <cstdio>
#include <stdexcept>

namespace {

struct Arrays {
    float* floats;
    int8_t* none;
    double* doubles;
    bool* flags;

    explicit Arrays(kt::Workspace& w)
        : floats(w.take<float>(5)), none(w.take<int8_t>(0)), doubles(w.take<double>(1000)), flags(w.take<bool>(3)) {}
};

// True if the array is aligned and ends before `next`.
template <class T>
bool fits(const T* array, int64_t count, const void* next) {
    return reinterpret_cast<uintptr_t>(array) % 64 == 0 && static_cast<const void*>(array + count) < next;
}

}  // namespace

int main() {
    kt::Workspace counting;
    const Arrays counted(counting);
    if (counted.floats || counted.none || counted.doubles || counted.flags) return 1;

    kt::Workspace workspace(counting.bytes());
    const Arrays a(workspace);
    const void* end = reinterpret_cast<char*>(a.floats) + counting.bytes();
    if (!fits(a.floats, 5, a.none) || !fits(a.none, 0, a.doubles)) return 2;
    if (!fits(a.doubles, 1000, a.flags) || !fits(a.flags, 3, end)) return 2;
    try {
        workspace.take<bool>(1);
    } catch (const std::logic_error& error) {
        std::puts(error.what());
    }
}
