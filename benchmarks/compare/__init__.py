# SPDX-License-Identifier: Apache-2.0
"""``make compare``: every optimizer at its own best rate on one small model."""
