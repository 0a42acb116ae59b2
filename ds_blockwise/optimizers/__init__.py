# SPDX-License-Identifier: Apache-2.0
"""The optimizers: settings, binding of tensors, the step, their state, and schedules."""
