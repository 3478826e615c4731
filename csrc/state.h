// The state of a module, as wgan_ext/states.py means it.
#pragma once
#include <pybind11/pybind11.h>

namespace wgan_ext {

// A list of what may be compared or hashed, of the module and those within: its identity and class; its attributes, as
// they are where their class is among `atoms`, else `frozen(value)`, without empty OrderedDicts and the names
// `ignored`; shape and dtype of each parameter and buffer. In Python this takes as long as all products of a small
// critic.
pybind11::list state_of(pybind11::handle module, const pybind11::frozenset& atoms, const pybind11::frozenset& ignored,
                        const pybind11::function& frozen);

// Whether that list would equal `state`, which is then not made, and the objects of the weak references that are the
// values of `references`, to which the identities in it belong, are still there.
bool same_state(pybind11::handle module, const pybind11::frozenset& atoms, const pybind11::frozenset& ignored,
                const pybind11::function& frozen, const pybind11::list& state, const pybind11::dict& references);

}  // namespace wgan_ext
