# SPDX-License-Identifier: Apache-2.0
"""The verbs of vmbusctl: what each is for, examples of it, and the arguments that it takes."""
