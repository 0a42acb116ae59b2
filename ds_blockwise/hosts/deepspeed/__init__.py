# SPDX-License-Identifier: Apache-2.0
"""The DeepSpeed host; the only folder that uses DeepSpeed and its private attributes."""
