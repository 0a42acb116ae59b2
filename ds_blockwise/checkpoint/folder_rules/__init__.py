# SPDX-License-Identifier: Apache-2.0
"""What holds in a folder of checkpoints: which names are tags, and who may write."""
