// SPDX-License-Identifier: Apache-2.0
//! The part of a check's walk (walk.rs) that goes over bitmaps: what they have and whether it can be.

use crate::bytes::{be16, be32, be64};
use crate::error::Result;
use crate::qcow2::check::{CheckReport, Checker};
use crate::qcow2::counts::Window;
use crate::qcow2::header::{autoclear, extension};
use crate::qcow2::walk::PIECE;

impl Checker<'_> {
    /// Bitmaps: the directory, each bitmap's table, and the clusters that it names.
    pub(super) fn walk_bitmaps(
        &mut self,
        window: &mut Window,
        report: &mut CheckReport,
    ) -> Result<()> {
        // Without its autoclear bit the extension does not count, and what it names is a leak.
        let counts = self.header.autoclear & autoclear::BITMAPS != 0;
        let extension = self.header.extension(extension::BITMAPS);
        let Some(extension) = extension.filter(|_| counts) else {
            return Ok(());
        };
        let number = be32(extension, 0).unwrap_or(0);
        let (len, offset) = (
            be64(extension, 8).unwrap_or(0),
            be64(extension, 16).unwrap_or(0),
        );
        let cluster = self.geometry.cluster();
        if number > 65535
            || len > 64 << 20
            || offset % cluster != 0
            || offset.saturating_add(len) > self.file_len
        {
            self.once(report, || "the bitmap directory is impossible".to_owned());
            return Ok(());
        }
        self.count(window, report, "bitmap directory", offset, len, 1);
        let mut at = 0;
        // Tables that overlap are wrong; they are not read more often than they can lie in the file.
        let mut room = self.file_len;
        for _ in 0..number {
            let mut entry = [0u8; 24];
            if at + 24 > len {
                self.once(report, || "the bitmap directory is cut short".to_owned());
                return Ok(());
            }
            self.file.read_at(&mut entry, offset + at)?;
            let (table, entries) = (
                be64(&entry, 0).unwrap_or(0),
                u64::from(be32(&entry, 8).unwrap_or(0)),
            );
            let names =
                u64::from(be16(&entry, 18).unwrap_or(0)) + u64::from(be32(&entry, 20).unwrap_or(0));
            at += (24 + names).next_multiple_of(8);
            if table % cluster != 0
                || entries > 8 << 20
                || table.saturating_add(entries * 8) > self.file_len
                || entries * 8 > room
            {
                self.once(report, || {
                    format!("a bitmap's table at {table:#x} is impossible")
                });
                continue;
            }
            room -= entries * 8;
            self.count(window, report, "bitmap table", table, entries * 8, 1);
            let mut piece = Vec::new();
            for from in (0..entries).step_by(PIECE as usize) {
                piece.resize(((entries - from).min(PIECE) * 8) as usize, 0);
                self.file.read_at(&mut piece, table + from * 8)?;
                for entry in piece.chunks_exact(8) {
                    let data = be64(entry, 0).unwrap_or(0) & 0x00ff_ffff_ffff_fe00;
                    if data != 0 {
                        self.count(window, report, "bitmap data", data, cluster, 1);
                    }
                }
            }
        }
        Ok(())
    }
}
