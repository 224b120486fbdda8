"""What the benchmarks run: rows of training steps and of kernels, each checked before it is timed, and what they share.

For scripts/bench_step.py, scripts/bench_kernels.py and the scripts under benchmarks/.
"""
