// SPDX-License-Identifier: Apache-2.0
//! Disk images: qcow2 and raw, and the engines that carry requests out.
