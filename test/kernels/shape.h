// An edge, as test_kernels.py writes it: a usual shape of which one thing is special.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

struct Shape {
    // "m=most-1": of the sizes that follow from the kernel, `unit` is the multiple of k in which it works.
    explicit Shape(const std::string& edge) {
        const size_t equals = edge.find('=');
        name_ = edge.substr(0, equals);
        value_ = edge.substr(equals + 1);
    }

    bool is(const char* name, const char* value) const { return name_ == name && value_ == value; }

    // The size called `name`: `usual`, unless it is what the edge is about.
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
