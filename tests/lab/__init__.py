# SPDX-License-Identifier: Apache-2.0
"""The harness that the tests share: nested host, whole systems, capabilities."""
