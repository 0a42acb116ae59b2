# SPDX-License-Identifier: Apache-2.0
"""Our optimizers inside of training tools, run as their pages in docs/tools say: ``make test-tools``."""
