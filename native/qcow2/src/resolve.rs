// SPDX-License-Identifier: Apache-2.0
//! Where the bytes of a read come from, through all layers.

use crate::mailbox::Waiter;
use crate::plan::{push_extent, Extent, Extents, Planned, Source};
use crate::qcow2::entry::{Mapping, Part};
use crate::qcow2::header::CryptMethod;
use crate::qcow2::Geometry;
use crate::state::{Layer, State};
use crate::types::{GuestCluster, HostOffset};

impl State {
    pub(crate) fn plan_read(&mut self, at: u64, len: u64, waiter: &Waiter) -> Planned<Extents> {
        let mut extents = Extents::new();
        self.resolve(0, at, len, waiter, &mut extents)?;
        Ok(extents)
    }

    /// Where `len` bytes from `at` come from, seen from `layer` downward.
    pub(crate) fn resolve(
        &mut self,
        layer: usize,
        at: u64,
        len: u64,
        waiter: &Waiter,
        extents: &mut Extents,
    ) -> Planned<()> {
        let (size, geometry) = match self.layers.get(layer) {
            None => {
                push_extent(
                    extents,
                    Extent {
                        len,
                        source: Source::Zero,
                    },
                );
                return Ok(());
            }
            Some(Layer::Raw(raw)) => {
                let inside = raw.size.saturating_sub(at).min(len);
                let source = Source::File {
                    file: raw.file,
                    offset: HostOffset(at),
                };
                push_extent(
                    extents,
                    Extent {
                        len: inside,
                        source,
                    },
                );
                push_extent(
                    extents,
                    Extent {
                        len: len - inside,
                        source: Source::Zero,
                    },
                );
                return Ok(());
            }
            Some(Layer::Qcow2(qcow2)) => (qcow2.header.size, qcow2.geometry),
        };
        let end = at + size.saturating_sub(at).min(len);
        self.resolve_qcow2(&geometry, at, end, waiter, extents)?;
        push_extent(
            extents,
            Extent {
                len: at + len - end,
                source: Source::Zero,
            },
        );
        Ok(())
    }

    fn resolve_qcow2(
        &mut self,
        geometry: &Geometry,
        start: u64,
        end: u64,
        waiter: &Waiter,
        extents: &mut Extents,
    ) -> Planned<()> {
        let size = geometry.cluster();
        let mut at = start;
        // Neighbours that are not in this layer are looked up below in one go.
        let mut below = None;
        while at < end {
            let cluster = GuestCluster(at >> geometry.cluster_bits);
            let skip = at % size;
            let mapping = self.lookup(geometry, cluster, waiter)?;
            let (part, run) = mapping.run(geometry, skip);
            let len = run.min(end - at);
            if part == Part::Below {
                below.get_or_insert(at);
                at += len;
                continue;
            }
            if let Some(from) = below.take() {
                self.resolve(geometry.layer + 1, from, at - from, waiter, extents)?;
            }
            let source = match (part, mapping, mapping.host()) {
                (Part::Data, Mapping::Compressed { host, stored }, _) => Source::Compressed {
                    file: geometry.file,
                    offset: host,
                    stored,
                    codec: geometry.codec,
                    cluster_size: size,
                    skip,
                    era: self.era,
                },
                (Part::Data, _, Some((host, _))) => {
                    let (file, offset) = (geometry.data, host.plus(skip));
                    match geometry.crypt {
                        CryptMethod::None => Source::File { file, offset },
                        CryptMethod::Aes => Source::Sealed {
                            file,
                            offset,
                            place: at,
                        },
                        CryptMethod::Luks { .. } => Source::Sealed {
                            file,
                            offset,
                            place: offset.0,
                        },
                    }
                }
                _ => Source::Zero,
            };
            push_extent(extents, Extent { len, source });
            at += len;
        }
        if let Some(from) = below {
            self.resolve(geometry.layer + 1, from, end - from, waiter, extents)?;
        }
        Ok(())
    }
}
