#include <sched.h>

#include "parallel/nodes.h"

namespace kt {

int current_node() { return node_of_cpu(sched_getcpu()); }

}  // namespace kt
