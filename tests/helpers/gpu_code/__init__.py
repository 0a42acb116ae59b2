# SPDX-License-Identifier: Apache-2.0
"""What Triton makes of the kernels of real models, without a GPU: in a process that has no interpreter."""
