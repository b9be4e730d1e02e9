# SPDX-License-Identifier: Apache-2.0
"""vmbus: privilege-separated virtual machines on D-Bus."""

__version__ = "0.1.0"
