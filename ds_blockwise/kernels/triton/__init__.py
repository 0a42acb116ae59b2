# SPDX-License-Identifier: Apache-2.0
"""The Triton backend for CUDA tensors; on the CPU it runs in Triton's interpreter."""
