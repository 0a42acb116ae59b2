# SPDX-License-Identifier: Apache-2.0
"""Configuration files as text and values; every mistake in them is noted, and none ends in a traceback."""
