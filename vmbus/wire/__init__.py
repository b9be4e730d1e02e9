# SPDX-License-Identifier: Apache-2.0
"""What crosses a boundary between vmbus processes: message types and their framing."""
