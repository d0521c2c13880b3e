#include "forms.h"

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <stdexcept>

#ifdef EVA_X86
#include <cpuid.h>
#endif

namespace eva {

#ifdef EVA_X86
namespace avx2 {
extern const Code kCode;
}
namespace avx512 {
extern const Code kCode;
}
namespace avx512bf16 {
extern const Code kCode;
}
#endif

namespace {

enum class Form { kNone, kAvx2, kAvx512, kAvx512Bf16 };  // each asks for all that the one before does

struct Named {
  Form form;
  const char* name;
  const Code* code;
};

const std::vector<Named>& table() {  // the greatest first
  static const std::vector<Named> forms{
#ifdef EVA_X86
      {Form::kAvx512Bf16, "avx512bf16", &avx512bf16::kCode},
      {Form::kAvx512, "avx512", &avx512::kCode},
      {Form::kAvx2, "avx2", &avx2::kCode},
#endif
  };
  return forms;
}

Processor this_processor() {
  Processor found{};
#ifdef EVA_X86
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &found.leaf_1_ecx, &edx)) return {};
  if (__get_cpuid_count(7, 0, &eax, &found.leaf_7_ebx, &ecx, &found.leaf_7_edx) && eax >= 1)
    __get_cpuid_count(7, 1, &found.leaf_7_1_eax, &ebx, &ecx, &edx);
  if (found.leaf_1_ecx >> 27 & 1) {  // OSXSAVE: without it XGETBV may not be asked
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    found.system = static_cast<uint64_t>(high) << 32 | low;
  }
#endif
  return found;
}

bool has(uint64_t word, std::initializer_list<int> bits) {
  return std::all_of(bits.begin(), bits.end(), [&](int bit) { return word >> bit & 1; });
}

std::atomic<const Named*> chosen{nullptr};

Form greatest(const Processor& p) {
  // FMA, OSXSAVE, AVX, F16C; AVX2; the registers xmm and ymm
  if (!has(p.leaf_1_ecx, {12, 27, 28, 29}) || !has(p.leaf_7_ebx, {5}) || !has(p.system, {1, 2})) return Form::kNone;
  // AVX-512 F, DQ, BW, VL; the masks, the upper halves of zmm0 … 15, and zmm16 … 31
  if (!has(p.leaf_7_ebx, {16, 17, 30, 31}) || !has(p.system, {5, 6, 7})) return Form::kAvx2;
  return has(p.leaf_7_1_eax, {5}) ? Form::kAvx512Bf16 : Form::kAvx512;
}

}  // namespace

std::string greatest_form(const Processor& processor) {
  const Form form = greatest(processor);
  for (const Named& entry : table())
    if (entry.form <= form) return entry.name;
  return "";
}

std::vector<std::string> built_forms() {
  std::vector<std::string> names;
  for (const Named& entry : table()) names.push_back(entry.name);
  return names;
}

std::vector<std::string> forms() {
  static const Form here = greatest(this_processor());
  std::vector<std::string> names;
  for (const Named& entry : table())
    if (entry.form <= here) names.push_back(entry.name);
  return names;
}

void choose_form(const std::string& name) {
  const Named* found = nullptr;
  const std::vector<std::string> here = forms();
  if (std::count(here.begin(), here.end(), name))
    found = &*std::find_if(table().begin(), table().end(), [&](const Named& entry) { return entry.name == name; });
  if (!found && !name.empty()) throw std::invalid_argument("form: expected one that this machine runs, got " + name);
  chosen = found;
}

std::string chosen_form() {
  const Named* entry = chosen;
  return entry ? entry->name : "";
}

const Code& code() {
  const Named* entry = chosen;
  if (!entry) throw std::logic_error("no form of the compiled code is chosen");
  return *entry->code;
}

}  // namespace eva
