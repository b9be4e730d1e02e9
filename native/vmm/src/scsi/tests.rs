// SPDX-License-Identifier: Apache-2.0
//! Commands and what becomes of them, without guest memory and without images.

use super::cdb::LEN;
use super::*;

const SIZE: u64 = 1 << 20;

fn cdb(bytes: &[u8]) -> Cdb {
    let mut all = [0; LEN];
    all[..bytes.len()].copy_from_slice(bytes);
    Cdb(all)
}

fn ask(unit: &mut Unit, bytes: &[u8]) -> Outcome {
    unit.command(&cdb(bytes), &[])
}

fn good(unit: &mut Unit, bytes: &[u8]) -> Vec<u8> {
    match ask(unit, bytes) {
        Outcome::Good(bytes) => bytes,
        other => panic!("{other:?}"),
    }
}

fn image(op: Op, offset: u64, len: u64) -> Outcome {
    Outcome::Image(Work { op, offset, len })
}

fn root() -> Unit {
    Unit::disk("root", SIZE, false)
}

#[test]
fn reads_and_writes_of_every_length_of_command_name_the_same_bytes() {
    let mut disk = root();
    let write = Op::Write { fua: false };
    for (read, wrote) in [
        (vec![0x08, 0, 0, 7, 3, 0], vec![0x0a, 0, 0, 7, 3, 0]),
        (
            vec![0x28, 0, 0, 0, 0, 7, 0, 0, 3, 0],
            vec![0x2a, 0, 0, 0, 0, 7, 0, 0, 3, 0],
        ),
        (
            vec![0xa8, 0, 0, 0, 0, 7, 0, 0, 0, 3],
            vec![0xaa, 0, 0, 0, 0, 7, 0, 0, 0, 3],
        ),
        (
            vec![0x88, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 3],
            vec![0x8a, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 3],
        ),
    ] {
        let (offset, len) = (7 * 512, 3 * 512);
        assert_eq!(ask(&mut disk, &read), image(Op::Read, offset, len));
        assert_eq!(ask(&mut disk, &wrote), image(write, offset, len));
    }
    // No blocks but in the shortest, where that is 256.
    assert_eq!(
        ask(&mut disk, &[0x08, 0, 0, 0, 0, 0]),
        image(Op::Read, 0, 256 * 512)
    );
    assert_eq!(good(&mut disk, &[0x28]), *b"");
    let forced = [0x2a, 8, 0, 0, 0, 1, 0, 0, 1, 0];
    assert_eq!(
        ask(&mut disk, &forced),
        image(Op::Write { fua: true }, 512, 512)
    );
}

#[test]
fn what_leads_behind_the_end_or_must_not_be_is_told() {
    let mut disk = root();
    let last = [0x28, 0, 0, 0, 0x07, 0xff, 0, 0, 2, 0];
    assert_eq!(ask(&mut disk, &last), Outcome::Check(Sense::OUT_OF_RANGE));
    let mut far = [0xff; 16];
    far[0] = 0x88;
    assert_eq!(ask(&mut disk, &far), Outcome::Check(Sense::OUT_OF_RANGE));
    let mut fixed = Unit::disk("fixed", SIZE, true);
    for bytes in [
        vec![0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0],
        vec![0x93, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
        vec![0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0],
    ] {
        assert_eq!(ask(&mut fixed, &bytes), Outcome::Check(Sense::PROTECTED));
    }
    for opcode in [0x04, 0x15, 0x5f, 0xff] {
        let unknown = Outcome::Check(Sense::UNKNOWN_COMMAND);
        assert_eq!(ask(&mut disk, &[opcode]), unknown);
    }
}

#[test]
fn space_is_zeroed_and_given_back() {
    let mut disk = root();
    let same = [0x93, 8, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 4];
    let zeroes = image(Op::WriteZeroes { unmap: true }, 1024, 2048);
    assert_eq!(disk.command(&cdb(&same), &[0; 512]), zeroes);
    assert_eq!(
        disk.command(&cdb(&same), &[1; 512]),
        Outcome::Check(Sense::BAD_PARAMETER)
    );
    assert_eq!(
        disk.command(&cdb(&same), &[0; 511]),
        Outcome::Check(Sense::SHORT_PARAMETERS)
    );
    let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0];
    list.extend(2u64.to_be_bytes());
    list.extend(4u32.to_be_bytes());
    list.extend([0; 4]);
    let unmap = cdb(&[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0]);
    assert_eq!(disk.command(&unmap, &list), image(Op::Discard, 1024, 2048));
    list[3] = 32;
    assert_eq!(
        disk.command(&unmap, &list),
        Outcome::Check(Sense::BAD_PARAMETER),
        "one descriptor is what the limits say"
    );
    assert_eq!(disk.command(&unmap, &[0; 8]), Outcome::Good(Vec::new()));
}

#[test]
fn capacities_are_those_of_the_image() {
    let mut disk = root();
    assert_eq!(good(&mut disk, &[0x25]), [0, 0, 7, 0xff, 0, 0, 2, 0]);
    let long = [0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32];
    let bytes = good(&mut disk, &long);
    assert_eq!(
        bytes[..16],
        [0, 0, 0, 0, 0, 0, 7, 0xff, 0, 0, 2, 0, 0, 3, 0x80, 0]
    );
    let mut huge = Unit::disk("huge", 4 << 40, false);
    assert_eq!(good(&mut huge, &[0x25])[..4], [0xff; 4]);
    disk.grew(2 * SIZE);
    assert_eq!(
        ask(&mut disk, &[0x25]),
        Outcome::Check(Sense::CAPACITY_CHANGED)
    );
    assert_eq!(good(&mut disk, &[0x25])[..4], [0, 0, 0x0f, 0xff]);
}

#[test]
fn an_answer_has_no_more_bytes_than_the_guest_has_room_for() {
    let mut disk = root();
    assert_eq!(good(&mut disk, &[0x12, 0, 0, 0, 36]).len(), 36);
    assert_eq!(good(&mut disk, &[0x12, 0, 0, 0, 5]).len(), 5);
    assert_eq!(
        good(&mut disk, &[0x12, 1, 0x80, 0, 255]),
        *b"\0\x80\0\x04root"
    );
    assert_eq!(good(&mut disk, &[0x1a, 0, 0x3f, 0, 4]).len(), 4);
    assert_eq!(good(&mut disk, &[0x03, 0, 0, 0, 0]), *b"");
}

#[test]
fn a_medium_is_locked_ejected_and_changed() {
    let mut drive = Unit::cdrom("cd", Some(SIZE));
    assert_eq!(good(&mut drive, &[0x00]), *b"");
    assert_eq!(good(&mut drive, &[0x1e, 0, 0, 0, 1]), *b"");
    assert!(drive.is_locked());
    let eject = [0x1b, 0, 0, 0, 2];
    assert_eq!(ask(&mut drive, &eject), Outcome::Check(Sense::LOCKED));
    let events = [0x4a, 1, 0, 0, 0x10, 0, 0, 0, 8];
    assert_eq!(good(&mut drive, &events)[4..6], [0, 2]);
    drive.ask_for_medium();
    assert_eq!(good(&mut drive, &events)[4..6], [1, 2], "the host wants it");
    assert_eq!(good(&mut drive, &events)[4], 0, "told once");
    good(&mut drive, &[0x1e, 0, 0, 0, 0]);
    good(&mut drive, &eject);
    assert_eq!(ask(&mut drive, &[0x00]), Outcome::Check(Sense::TRAY_OPEN));
    assert!(!drive.is_locked());
    good(&mut drive, &[0x1b, 0, 0, 0, 3]);
    assert_eq!(good(&mut drive, &[0x00]), *b"");

    drive.set_medium(None);
    assert_eq!(
        ask(&mut drive, &[0x00]),
        Outcome::Check(Sense::MEDIUM_CHANGED)
    );
    assert_eq!(ask(&mut drive, &[0x28]), Outcome::Check(Sense::TRAY_OPEN));
    drive.set_medium(Some(2 * SIZE));
    assert_eq!(
        ask(&mut drive, &[0x00]),
        Outcome::Check(Sense::MEDIUM_CHANGED)
    );
    assert_eq!(good(&mut drive, &[0x25]), [0, 0, 3, 0xff, 0, 0, 8, 0]);
    let block = [0x28, 0, 0, 0, 0, 16, 0, 0, 1, 0];
    assert_eq!(ask(&mut drive, &block), image(Op::Read, 16 * 2048, 2048));
    let write = [0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    assert_eq!(
        ask(&mut drive, &write),
        Outcome::Check(Sense::UNKNOWN_COMMAND)
    );
}

#[test]
fn the_contents_are_one_track() {
    let mut drive = Unit::cdrom("cd", Some(2048 * 450));
    let toc = good(&mut drive, &[0x43, 2, 0, 0, 0, 0, 0, 0, 20]);
    assert_eq!(toc[..4], [0, 18, 1, 1]);
    assert_eq!(toc[4..12], [0, 0x14, 1, 0, 0, 0, 2, 0]);
    assert_eq!(toc[12..], [0, 0x14, 0xaa, 0, 0, 0, 8, 0]);
    let mut empty = Unit::cdrom("cd", None);
    assert_eq!(ask(&mut empty, &[0x43]), Outcome::Check(Sense::NO_MEDIUM));
}

#[test]
fn a_unit_goes_on_as_another_one_was_and_tells_what_is_new() {
    let mut drive = Unit::cdrom("cd", Some(SIZE));
    good(&mut drive, &[0x1e, 0, 0, 0, 1]);
    let mut same = Unit::cdrom("cd", Some(SIZE));
    same.take(drive.remembered());
    assert!(same.is_locked());
    let mut other = Unit::cdrom("cd", Some(2 * SIZE));
    other.take(drive.remembered());
    assert_eq!(
        ask(&mut other, &[0x00]),
        Outcome::Check(Sense::MEDIUM_CHANGED)
    );
}

#[test]
fn random_commands_stay_within_the_medium() {
    let mut seed = 0x2545_f491_4f6c_dd1du64;
    let mut random = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut units = [
        root(),
        Unit::cdrom("cd", Some(SIZE)),
        Unit::cdrom("no", None),
    ];
    for _ in 0..200_000 {
        let mut bytes = [0; LEN];
        for part in bytes.chunks_mut(8) {
            part.copy_from_slice(&random().to_le_bytes());
        }
        // Small numbers are the interesting ones.
        if random() % 2 == 0 {
            bytes[2..9].iter_mut().for_each(|byte| *byte &= 1);
        }
        let parameters = vec![random() as u8 & 1; (random() % 600) as usize];
        let unit = &mut units[(random() % 3) as usize];
        if let Outcome::Image(work) = unit.command(&Cdb(bytes), &parameters) {
            assert!(work.offset + work.len <= SIZE, "{work:?}");
        }
    }
}
