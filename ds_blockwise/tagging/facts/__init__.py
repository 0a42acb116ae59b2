# SPDX-License-Identifier: Apache-2.0
"""What is known of a parameter beside its role: its heads, and where a norm stands."""
