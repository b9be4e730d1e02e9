# SPDX-License-Identifier: Apache-2.0
"""What children of the broker do after they have given root up; never loaded while the uid is 0."""

import os

if os.getuid() == 0:
    raise ImportError("vmbus.broker.dropped is for processes that are not root any more")
