// SPDX-License-Identifier: Apache-2.0
//! What the engine says, as JSON with qemu-img's keys.

use serde_json::{json, Value};
use vmbus_qcow2::{Bitmap, CheckReport, Encryption, ImageInfo, Snapshot};

pub(super) fn describe(info: &ImageInfo) -> Value {
    // QEMU counts a file's bytes in sectors.
    let mut value = json!({
        "virtual-size": info.size, "actual-size": info.allocated,
        "file-size": info.file_len.next_multiple_of(512), "regular": info.regular,
    });
    if let Some(qcow2) = &info.qcow2 {
        value["qcow2"] = json!({
            "version": qcow2.version, "cluster-size": qcow2.cluster_size, "refcount-bits": qcow2.refcount_bits,
            "compression-type": if qcow2.zstd { "zstd" } else { "zlib" }, "lazy-refcounts": qcow2.lazy_refcounts,
            "extended-l2": qcow2.extended_l2,
            "dirty": qcow2.dirty, "corrupt": qcow2.corrupt, "backing-name": qcow2.backing_name,
            "backing-format": qcow2.backing_format, "data-name": qcow2.data_name, "data-raw": qcow2.data_raw,
            "encrypt": qcow2.encryption.as_ref().map(encryption_json),
            "bitmaps": qcow2.bitmaps.iter().map(bitmap_json).collect::<Vec<_>>(),
            "snapshots": qcow2.snapshots.iter().map(snapshot_json).collect::<Vec<_>>(),
        });
    }
    value
}

/// With qemu-img's keys.
pub(super) fn encryption_json(encryption: &Encryption) -> Value {
    let luks = match encryption {
        Encryption::Aes => return json!({"format": "aes"}),
        Encryption::Luks(luks) => luks,
    };
    let slot = |(iterations, offset): &(Option<u32>, u64)| match iterations {
        Some(count) => json!({
            "active": true, "iters": count, "key-offset": offset, "stripes": luks.stripes,
        }),
        None => json!({"active": false, "key-offset": offset}),
    };
    let mut value = json!({
        "format": "luks", "cipher-alg": luks.cipher, "cipher-mode": luks.mode, "ivgen-alg": luks.iv,
        "hash-alg": luks.hash, "uuid": luks.uuid, "detached-header": false,
        "payload-offset": luks.payload_offset, "master-key-iters": luks.iterations,
        "slots": luks.slots.iter().map(slot).collect::<Vec<_>>(),
    });
    if let Some(hash) = &luks.iv_hash {
        value["ivgen-hash-alg"] = json!(hash);
    }
    value
}

pub(super) fn bitmap_json(bitmap: &Bitmap) -> Value {
    let flags = [("in-use", bitmap.in_use), ("auto", bitmap.enabled)];
    let set: Vec<&str> = flags
        .iter()
        .filter_map(|(name, on)| on.then_some(*name))
        .collect();
    json!({ "flags": set, "name": bitmap.name, "granularity": bitmap.granularity })
}

pub(super) fn snapshot_json(snapshot: &Snapshot) -> Value {
    let mut value = json!({
        "id": snapshot.id, "name": snapshot.name, "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date.0, "date-nsec": snapshot.date.1,
        "vm-clock-sec": snapshot.vm_clock / 1_000_000_000, "vm-clock-nsec": snapshot.vm_clock % 1_000_000_000,
    });
    if let Some(icount) = snapshot.icount {
        value["icount"] = json!(icount);
    }
    value
}

pub(super) fn report(report: &CheckReport) -> Value {
    json!({
        "image-end-offset": report.image_end, "total-clusters": report.total_clusters,
        "allocated-clusters": report.allocated_clusters, "fragmented-clusters": report.fragmented_clusters,
        "compressed-clusters": report.compressed_clusters, "corruptions": report.corruptions, "leaks": report.leaks,
        "corruptions-fixed": report.corruptions_fixed, "leaks-fixed": report.leaks_fixed, "messages": report.messages,
    })
}
