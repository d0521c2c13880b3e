// The code for processors with AVX-512.
#include "forms.h"

#ifdef EVA_X86

#define EVA_FORM avx512
#define EVA_REGISTER_BYTES 64
#define EVA_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))

#include "form.h"

#endif
