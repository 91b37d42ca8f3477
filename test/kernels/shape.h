// An edge case, as test_kernels.py writes it: a usual shape with one special size.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

struct Shape {
    // E.g. "m=most-1". most, half and unit depend on the kernel; unit is the step in which it processes k.
    explicit Shape(const std::string& edge) {
        const size_t equals = edge.find('=');
        name_ = edge.substr(0, equals);
        value_ = edge.substr(equals + 1);
    }

    bool is(const char* name, const char* value) const { return name_ == name && value_ == value; }

    // The size called `name`: `usual`, unless the edge is about it.
    int64_t size(const char* name, int64_t usual, int64_t most, int64_t unit = 1) const {
        if (name_ != name) return usual;
        int64_t base = 0;
        const char* rest = value_.c_str();
        const std::pair<const char*, int64_t> words[] = {{"most", most}, {"half", most / 2}, {"unit", unit}};
        for (const auto& [word, meaning] : words) {
            if (strncmp(rest, word, strlen(word)) == 0) base = meaning, rest += strlen(word);
        }
        const int64_t value = base + atoll(rest);
        return value < 1 ? 1 : value;
    }
    // Elements from one row to the next.
    int64_t stride(int64_t least) const { return least + (name_ == "stride" ? atoll(value_.c_str()) : 0); }

private:
    std::string name_, value_;
};
