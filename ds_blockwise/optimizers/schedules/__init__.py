# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules: shapes as plain curves, the class that moves an optimizer, tables, refinement."""
