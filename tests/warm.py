"""What the processes of `ranks.start_ranks` have imported when they start."""

from nvfp4_titan.titan import cpu_runtime

cpu_runtime.install()

import nvfp4_titan.titan.trainer  # noqa: E402, F401  (imports torchtitan)
