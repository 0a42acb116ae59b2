# SPDX-License-Identifier: Apache-2.0
"""Who calls the optimizers: frameworks that cut parameters and step the parts."""
