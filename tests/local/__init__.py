# SPDX-License-Identifier: Apache-2.0
"""Tests on this machine: a real broker, a private bus, this host's /dev/kvm."""
