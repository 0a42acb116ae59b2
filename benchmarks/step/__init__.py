# SPDX-License-Identifier: Apache-2.0
"""``make bench-kernels``: one optimizer step against its peers."""
