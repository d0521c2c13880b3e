// All of one form. What includes this says how its namespace is called (EVA_FORM), how wide registers are
// (EVA_REGISTER_BYTES), and what functions are compiled for (EVA_TARGET). Everything inlined from the standard library is
// compiled for any processor: it may be what the linker keeps of several copies.
#include "dense.h"
#include "float32_products.h"
#include "leading_eigen_form.h"
#include "low_rank_form.h"
#include "refresh_form.h"
#include "sketch_form.h"
#include "symmetric_eigen_form.h"
#include "thin_form.h"

namespace eva::EVA_FORM {

Code code() {
  return {&accumulate_in_blocks<Block>, &accumulate_triangle<Triangle>, &sketch_add, &refresh, &cholesky_qr,
          &symmetric_eigen_of_all, &leading_eigen_of_all, &project_rows, &add_outer, &add_low_rank};
}

}  // namespace eva::EVA_FORM
