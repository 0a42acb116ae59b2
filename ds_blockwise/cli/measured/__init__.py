# SPDX-License-Identifier: Apache-2.0
"""Commands about what a run has measured: sharpness, and the schedule that its gradients ask for."""
