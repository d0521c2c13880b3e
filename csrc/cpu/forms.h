// The forms of the compiled code for a CPU: one for each set of instructions, and which of them runs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gram.h"
#include "low_rank.h"
#include "refresh.h"
#include "sketch.h"
#include "subspace.h"
#include "symmetric_eigen.h"
#include "thin.h"

#if defined(__x86_64__) && defined(__GNUC__) && (__GNUC__ >= 11 || defined(__clang__))
#define EVA_X86 1
#endif

namespace eva {

// What a form consists of.
struct Code {
  SubspaceAccumulate* subspace;
  GramAccumulate* gram;
  SketchAdd* sketch;
  Refresh* refresh;
  CholeskyQr* cholesky_qr;
  SymmetricEigen* symmetric_eigen;
  LeadingEigen* leading_eigen;
  ThinProduct* project;  // X F
  ThinProduct* outer;    // Xᵀ F
  LowRankAdd* low_rank;
};

// What a processor says of itself (CPUID's leaves 1, 7 and 7.1; whether 8 tiles of 16 rows of 64 bytes are among its
// configurations), and which registers its system keeps (XCR0).
struct Processor {
  uint32_t leaf_1_ecx, leaf_7_ebx, leaf_7_edx, leaf_7_1_eax;
  uint64_t system;
  bool has_full_tiles;
};

// The greatest form that such a processor has all instructions for, and its system keeps all registers of; "" for none.
std::string greatest_form(const Processor& processor);

// Their names, the greatest first: those of this build, and those that this machine runs of them. The first call asks
// the system for what it only gives on demand.
std::vector<std::string> built_forms();
std::vector<std::string> forms();

// From here on the form of that name runs, in all threads; "" stands for none. Throws std::invalid_argument where this
// machine does not run it; `emulated` says that it does, though its processor has not all instructions: for tests.
void choose_form(const std::string& name, bool emulated = false);
std::string chosen_form();

// That of the form that runs. Throws std::logic_error where none does.
const Code& code();

}  // namespace eva
