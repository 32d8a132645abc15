"""Kernels over neighbours."""
