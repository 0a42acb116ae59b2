# SPDX-License-Identifier: Apache-2.0
"""What is wrong in a DeepSpeed JSON, before an engine is built from it."""
