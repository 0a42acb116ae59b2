# SPDX-License-Identifier: Apache-2.0
"""The C++ backend for CPU tensors, compiled at first use."""
