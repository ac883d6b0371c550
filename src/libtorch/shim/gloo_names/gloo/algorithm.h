// ProcessGroupGloo.hpp includes this header and uses nothing of it. See ../README.md.
#pragma once
