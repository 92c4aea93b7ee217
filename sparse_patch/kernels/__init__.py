"""Shared helpers of all kernels. They take tensors only; nothing here knows a call, a plan or a method."""
