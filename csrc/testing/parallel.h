// The threads of the test module: as many as a test asks for, new ones for every call.
#pragma once

#include <cstdint>

namespace widenet {

void set_num_threads(int64_t count);

}  // namespace widenet
