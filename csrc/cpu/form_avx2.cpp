// The code for processors with AVX2 and FMA.
#include "forms.h"

#ifdef EVA_X86

#define EVA_FORM avx2
#define EVA_REGISTER_BYTES 32
#define EVA_TARGET __attribute__((target("avx2,fma,f16c")))

#include "form.h"

#endif
