# SPDX-License-Identifier: Apache-2.0
"""What machine types show a guest, and machines saved by each version that was released."""
