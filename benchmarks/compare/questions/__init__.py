# SPDX-License-Identifier: Apache-2.0
"""Questions beside `make compare`, each with a rule that was written before its runs."""
