"""Compile every Triton kernel ahead of time, read its machine code, and fail where it is not what it should be."""
