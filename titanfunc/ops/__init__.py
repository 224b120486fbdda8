"""Tensor operations in plain torch: each one here is the specification of its kernel."""
