#pragma once

// Gate activations act(g) and their derivatives, on vectors.

#include <type_traits>

#include "isa/math-inl.h"
#include "moe/problem.h"

namespace kt::KT_ISA {

template <class A>
struct Gate {
    Vec<A> value, derivative;
};

struct Silu {
    // act = g s, act' = s (1 + g (1 - s)), s = 1 / (1 + e^-g)
    template <class A>
    static Gate<A> gate(Vec<A> g) {
        const Vec<A> s = A{1} / (A{1} + exp(-g));
        return {g * s, s * (A{1} + g * (A{1} - s))};
    }
};

struct Gelu {
    // act = g P, act' = P + g p: P and p the distribution function and density of the normal distribution
    template <class A>
    static Gate<A> gate(Vec<A> g) {
        const Vec<A> x = g * static_cast<A>(0.70710678118654752440);
        const Vec<A> gauss = exp(-x * x);
        const Vec<A> cdf = A{0.5} + A{0.5} * erf(x, gauss);
        return {g * cdf, cdf + g * gauss * static_cast<A>(0.39894228040143267794)};
    }
};

struct GeluTanh {
    // act = g s, s = 1 / (1 + e^-2z), z = sqrt(2/pi) (g + 0.044715 g^3): the same as 0.5 g (1 + tanh z)
    template <class A>
    static Gate<A> gate(Vec<A> g) {
        const A c = static_cast<A>(2 * 0.79788456080286535588), d = static_cast<A>(0.044715);
        const Vec<A> s = A{1} / (A{1} + exp(-(c * g * (A{1} + d * g * g))));
        return {g * s, s + g * s * (A{1} - s) * c * (A{1} + 3 * d * g * g)};
    }
};

// An activation with parameters is constructed from activation_args.
template <class Type>
inline Type make_activation([[maybe_unused]] const double* args) {
    if constexpr (std::is_constructible_v<Type, const double*>) {
        return Type(args);
    } else {
        return Type{};
    }
}

// Calls f with the activation of the layer.
template <class F>
inline void with_activation(const Problem& p, F f) {
    switch (p.activation) {
#define KT_ACTIVATION(name, Type, num_args) \
    case Activation::k##Type:               \
        return f(make_activation<Type>(p.activation_args));
#include "moe/activations.def"
#undef KT_ACTIVATION
    }
}

}  // namespace kt::KT_ISA
