// One sentence for the user, without the heap: errors have to work where memory has run out.
#pragma once

#include <cstdarg>
#include <cstdio>

namespace graphprune {

struct Sentence {
  char text[384] = "";

  // Whether there is something to say.
  explicit operator bool() const { return text[0] != '\0'; }
};

__attribute__((format(printf, 1, 2))) inline Sentence sentence(const char* format, ...) {
  Sentence made;
  va_list values;
  va_start(values, format);
  std::vsnprintf(made.text, sizeof made.text, format, values);
  va_end(values);
  return made;
}

}  // namespace graphprune
