"""What the benchmarks run: rows of training steps and of kernels, each checked before it is timed, and what they share.

For scripts/bench_step.py, scripts/bench_kernels.py and the scripts under benchmarks/. What they time is assembled as in
a run.
"""

from titanfunc import caches

caches.have_one_assembler()
