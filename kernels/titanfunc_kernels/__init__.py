"""Raw Triton kernels, forward and backward. Imports torch and triton only: autograd is bound in titanfunc.ops."""
