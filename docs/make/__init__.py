# SPDX-License-Identifier: Apache-2.0
"""Programs that make documents and completions from their one source; `make docs` runs them all.

Each has ``OUTPUT`` (the file, from the top of the tree) and ``text()``; a test holds the files to them.
"""
