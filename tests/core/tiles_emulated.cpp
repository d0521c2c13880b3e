// AMX's tiles on a processor that has none: a handler of SIGILL does what the instructions would have done, so that the
// compiled code for AMX runs as it is. Every thread has tiles of its own. After Intel's description of the instructions:
// products of bfloat16 are added by fused operations rounded to nearest even, even and odd pairs apart and then together;
// denormals are zeros, as operands and as results.
//
//   start_emulating()       from then on, in all threads
//   emulated_instructions() how many there were
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // both are said of GCC's own intrinsics, wrongly
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Tiles {
  bool configured;
  int rows[kTiles], row_bytes[kTiles];
  alignas(64) uint8_t data[kTiles][kRows][kRowBytes];
};

__attribute__((tls_model("initial-exec"))) thread_local Tiles* own = nullptr;  // made without the heap: in a handler
std::atomic<long> instructions{0};
struct sigaction before;

Tiles& tiles() {
  if (!own) {
    void* memory = mmap(nullptr, sizeof(Tiles), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) abort();
    own = static_cast<Tiles*>(memory);
  }
  return *own;
}

// An instruction with a three-byte VEX prefix of opcode map 0F38, and where it reads its operands.
class Instruction {
 public:
  Instruction(const uint8_t* code, const greg_t* registers) : code_(code), registers_(registers) {}

  bool is_known() const { return code_[0] == 0xc4 && (code_[1] & 0x1f) == 2 && (code_[2] & 0x84) == 0; }
  int opcode() const { return code_[3]; }
  int prefix() const { return code_[2] & 3; }  // 1: 66, 2: F3, 3: F2
  int reg() const { return code_[4] >> 3 & 7; }
  int rm() const { return code_[4] & 7; }
  int third() const { return ~code_[2] >> 3 & 15; }  // VEX.vvvv
  bool has_memory() const { return code_[4] >> 6 != 3; }
  bool has_index() const { return has_memory() && rm() == 4; }

  int size() const {
    const int mode = code_[4] >> 6, base = has_index() ? code_[5] & 7 : rm();
    const int offset = mode == 1 ? 1 : mode == 2 || (mode == 0 && base == 5) ? 4 : 0;
    return 5 + has_index() + offset;
  }

  uint8_t* base() const {
    const int mode = code_[4] >> 6, number = has_index() ? code_[5] & 7 : rm();
    int32_t offset = 0;
    if (mode == 1) offset = static_cast<int8_t>(code_[size() - 1]);
    if (mode == 2 || (mode == 0 && number == 5)) std::memcpy(&offset, code_ + size() - 4, 4);
    uint64_t address = 0;
    if (mode == 0 && number == 5)  // relative to the next instruction, or to nothing
      address = has_index() ? 0 : reinterpret_cast<uint64_t>(code_ + size());
    else
      address = general(number + (code_[1] & 0x20 ? 0 : 8));
    return reinterpret_cast<uint8_t*>(address + offset);
  }

  int64_t stride() const {
    const int number = (code_[5] >> 3 & 7) + (code_[1] & 0x40 ? 0 : 8);
    return number == 4 ? 0 : static_cast<int64_t>(general(number)) << (code_[5] >> 6);
  }

 private:
  uint64_t general(int number) const {
    static constexpr int kWhere[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                     REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return static_cast<uint64_t>(registers_[kWhere[number]]);
  }

  const uint8_t* code_;
  const greg_t* registers_;
};

bool configure(const uint8_t* from) {
  Tiles& t = tiles();
  std::memset(&t, 0, sizeof t);
  if (from[0] != 1 || from[1] != 0) return false;  // the one palette; no start within a tile
  for (int i = 0; i < kTiles; ++i) {
    uint16_t bytes;
    std::memcpy(&bytes, from + 16 + 2 * i, 2);
    t.row_bytes[i] = bytes, t.rows[i] = from[48 + i];
    if (bytes > kRowBytes || from[48 + i] > kRows) return false;
  }
  return t.configured = true;
}

__attribute__((target("avx512f"))) void multiply(int sum, int left, int right) {
  Tiles& t = tiles();
  const int pairs = t.row_bytes[left] / 4;
  const __mmask16 lanes = static_cast<__mmask16>((1u << t.row_bytes[sum] / 4) - 1);
  for (int m = 0; m < t.rows[sum]; ++m) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int k = 0; k < pairs; ++k) {
      uint32_t pair;
      std::memcpy(&pair, t.data[left][m] + 4 * k, 4);
      const __m512i row = _mm512_load_si512(t.data[right][k]);
      const __m512 low = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(pair << 16)));
      const __m512 high = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(pair & 0xffff0000)));
      even = _mm512_fmadd_ps(low, _mm512_castsi512_ps(_mm512_slli_epi32(row, 16)), even);
      odd = _mm512_fmadd_ps(high, _mm512_castsi512_ps(_mm512_and_si512(row, _mm512_set1_epi32(~0xffff))), odd);
    }
    uint8_t* to = t.data[sum][m];
    const __m512 together = _mm512_add_ps(_mm512_load_ps(to), _mm512_add_ps(even, odd));
    _mm512_store_ps(to, _mm512_maskz_mov_ps(lanes, together));
  }
}

bool emulate(const Instruction& it) {
  if (!it.is_known()) return false;
  Tiles& t = tiles();
  if (it.opcode() == 0x49) {
    if (it.prefix() == 0 && it.has_memory()) return it.reg() == 0 && configure(it.base());
    if (it.prefix() == 0) return std::memset(&t, 0, sizeof t);  // tilerelease
    if (it.prefix() != 3 || it.has_memory() || !t.configured) return false;
    std::memset(t.data[it.reg()], 0, sizeof t.data[0]);  // tilezero
    return true;
  }
  if (!t.configured) return false;
  if (it.opcode() == 0x4b && it.has_index() && (it.prefix() == 2 || it.prefix() == 3)) {
    const int tile = it.reg();
    if (it.prefix() == 3) std::memset(t.data[tile], 0, sizeof t.data[0]);
    for (int row = 0; row < t.rows[tile]; ++row) {
      uint8_t* memory = it.base() + row * it.stride();
      if (it.prefix() == 3)
        std::memcpy(t.data[tile][row], memory, t.row_bytes[tile]);
      else
        std::memcpy(memory, t.data[tile][row], t.row_bytes[tile]);
    }
    return true;
  }
  if (it.opcode() != 0x5c || it.prefix() != 2 || it.has_memory()) return false;
  const int sum = it.reg(), left = it.rm(), right = it.third();
  const bool fits = right < kTiles && t.rows[sum] == t.rows[left] && t.row_bytes[left] / 4 == t.rows[right] &&
                    t.row_bytes[sum] == t.row_bytes[right];
  if (!fits || sum == left || sum == right || left == right) return false;
  multiply(sum, left, right);
  return true;
}

void handle(int number, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const uint8_t* code = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  const Instruction instruction(code, registers);
  _mm_setcsr(0x9fc0);  // denormals are zeros, to nearest even, nothing is raised; what was is put back with the registers
  if (emulate(instruction)) {
    registers[REG_RIP] += instruction.size();
    instructions.fetch_add(1, std::memory_order_relaxed);
  } else {
    sigaction(number, &before, nullptr);  // who was there before sees it again
  }
}

}  // namespace

extern "C" int start_emulating() {
  struct sigaction action = {};
  action.sa_sigaction = &handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  return sigaction(SIGILL, &action, &before);
}

extern "C" long emulated_instructions() { return instructions; }
