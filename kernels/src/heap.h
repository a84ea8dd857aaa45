// Objects on the heap by malloc: operator new would bring the C++ runtime library along, and throw.
#pragma once

#include <cstdlib>
#include <new>
#include <utility>

namespace graphprune {

// Null where memory has run out.
template <class Object, class... Arguments>
Object* make_object(Arguments&&... arguments) {
  void* memory = std::malloc(sizeof(Object));
  return memory ? ::new (memory) Object(std::forward<Arguments>(arguments)...) : nullptr;
}

template <class Object>
void free_object(Object* object) {
  object->~Object();
  std::free(object);
}

}  // namespace graphprune
