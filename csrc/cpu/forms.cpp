#include "forms.h"

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <stdexcept>

#ifdef EVA_X86
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace eva {

namespace avx2 {
Code code();
}
namespace avx512 {
Code code();
}
namespace avx512bf16 {
Code code();
}
namespace amx {
Code code();
}

namespace {

enum class Form { kNone, kAvx2, kAvx512, kAvx512Bf16, kAmx };  // each asks for all that the one before does

struct Named {
  Form form;
  const char* name;
  Code code;
};

const std::vector<Named>& table() {  // the greatest first
  static const std::vector<Named> forms{
#ifdef EVA_X86
#ifdef EVA_AMX
      {Form::kAmx, "amx", amx::code()},
#endif
      {Form::kAvx512Bf16, "avx512bf16", avx512bf16::code()},
      {Form::kAvx512, "avx512", avx512::code()},
      {Form::kAvx2, "avx2", avx2::code()},
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
  if (__get_cpuid_count(0x1d, 1, &eax, &ebx, &ecx, &edx))
    found.has_full_tiles = ebx >> 16 >= 8 && (ebx & 0xffff) >= 64 && (ecx & 0xffff) >= 16;
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
  if (!has(p.leaf_7_1_eax, {5})) return Form::kAvx512;  // AVX-512 BF16
  // AMX BF16 and tiles; their sizes and what they hold
  const bool has_tiles = has(p.leaf_7_edx, {22, 24}) && has(p.system, {17, 18}) && p.has_full_tiles;
  return has_tiles ? Form::kAmx : Form::kAvx512Bf16;
}

// The kernel gives a process room for tiles when it asks, and may refuse.
bool may_use_tiles() {
#if defined(EVA_AMX) && defined(__linux__)
  constexpr int kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
#else
  return false;
#endif
}

Form greatest_here() {
  const Form form = greatest(this_processor());
  return form == Form::kAmx && !may_use_tiles() ? Form::kAvx512Bf16 : form;
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
  static const Form here = greatest_here();
  std::vector<std::string> names;
  for (const Named& entry : table())
    if (entry.form <= here) names.push_back(entry.name);
  return names;
}

void choose_form(const std::string& name, bool emulated) {
  const Named* found = nullptr;
  const std::vector<std::string> here = emulated ? built_forms() : forms();
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
  return entry->code;
}

}  // namespace eva
