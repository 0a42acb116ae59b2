# SPDX-License-Identifier: Apache-2.0
"""A starting learning rate without a sweep: published rules, and what they amount to for one run."""
