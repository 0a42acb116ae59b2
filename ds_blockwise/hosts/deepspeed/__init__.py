# SPDX-License-Identifier: Apache-2.0
"""The DeepSpeed host: the only folder of the package that imports DeepSpeed or uses its private attributes."""
