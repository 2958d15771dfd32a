// Numbers of the storage formats' modes.
#pragma once

namespace qsdpa {

enum Mode { AFFINE = 0, SYMMETRIC = 1, MXFP4 = 2, MXFP8 = 3, NVFP4 = 4 };

}  // namespace qsdpa
