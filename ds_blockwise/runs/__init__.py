# SPDX-License-Identifier: Apache-2.0
"""One training run as files: model, data, parallelism, engine JSON; their check and the memory plan."""
