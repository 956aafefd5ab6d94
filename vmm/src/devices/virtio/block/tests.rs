//! The block device driven as a guest's driver does it.

mod driver;

use std::fs;
use std::os::unix::fs::MetadataExt;

use proptest::prelude::*;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use self::driver::{Op, Rig};
use super::*;

const MIB: usize = 1 << 20;

fn random(seed: u64, length: usize) -> Vec<u8> {
    // xorshift64*: every byte differs from its neighbours.
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

#[test]
fn what_is_written_is_read_back_and_on_the_image() {
    let rig = Rig::new(MIB);
    let data = random(1, 8192);
    rig.run(Op::write(16, &data));
    assert_eq!(rig.run(Op::read(16, 8192)).data, data);
    rig.run(Op::flush());
    assert_eq!(fs::read(rig.path()).unwrap()[8192..16384], data);
}

#[test]
fn a_device_that_nobody_used_yet_may_be_reset() {
    // As every driver does first.
    let mut rig = Rig::new(MIB);
    rig.reset_and_activate();
    for _ in 0..2 {
        rig.block.reset();
    }
    rig.reset_and_activate();
    rig.run(Op::read(0, 512));
}

#[test]
fn requests_that_make_no_sense_are_answered_and_change_nothing() {
    let rig = Rig::new(MIB);
    let end = (MIB / 512) as u64;
    let io_error = [
        Op::read(end, 512),
        Op::read(end - 1, 1024),
        Op::write(end - 1, &[1; 1024]),
        Op::read(u64::MAX, 512),
        Op::read(u64::MAX / 512 + 1, 512),
        Op::write(0, &[1; 100]),
        Op::read(0, 511),
        Op { kind: 11, out: range(end, 1, 0), ..Op::default() },
        Op { kind: 11, out: range(0, 0, 0), ..Op::default() },
        Op { kind: 11, out: range(0, u32::MAX, 0), ..Op::default() },
        Op { kind: 11, out: vec![0; 15], ..Op::default() },
        Op { kind: 13, out: [range(0, 1, 0), range(8, 1, 0)].concat(), ..Op::default() },
        Op { header_bytes: 15, ..Op::flush() },
        Op { data_at: Some(0xffff_0000_0000), ..Op::read(0, 512) },
    ];
    for op in io_error {
        assert_eq!(rig.answer(op.clone()).status, VIRTIO_BLK_S_IOERR as u8, "{op:?}");
    }
    let unsupported = [
        Op { kind: 99, ..Op::default() },
        Op { kind: 2, ..Op::default() },
        Op { kind: 11, out: range(0, 8, 1), ..Op::default() },
        Op { kind: 13, out: range(0, 8, 2), ..Op::default() },
    ];
    for op in unsupported {
        assert_eq!(rig.answer(op.clone()).status, VIRTIO_BLK_S_UNSUPP as u8, "{op:?}");
    }
    assert!(fs::read(rig.path()).unwrap().iter().all(|byte| *byte == 0));
    assert!(!rig.interrupt.is_broken());
    rig.run(Op::read(0, 512));
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn a_request_without_a_place_for_its_answer_breaks_the_device_until_it_is_reset() {
    for malformed in [driver::Malformed::NoStatus, driver::Malformed::LeadsNowhere, driver::Malformed::WritableFirst] {
        let mut rig = Rig::new(MIB);
        rig.submit_malformed(malformed);
        rig.wait_until(|rig| rig.interrupt.is_broken());
        assert_eq!(rig.interrupt.status() & 2, 2, "the driver is told");
        rig.reset_and_activate();
        rig.run(Op::write(0, &[7; 512]));
    }
}

#[test]
fn a_disk_that_may_only_be_read_is_not_written() {
    let rig = Rig::with(MIB, |rig| rig.read_only = true);
    assert_ne!(rig.block.features() & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(rig.block.features() & 1 << VIRTIO_BLK_F_DISCARD, 0);
    for op in [Op::write(0, &[1; 512]), Op { kind: 11, out: range(0, 8, 0), ..Op::default() }] {
        assert_eq!(rig.answer(op).status, VIRTIO_BLK_S_IOERR as u8);
    }
    rig.run(Op::read(0, 512));
    rig.run(Op::flush());
}

#[test]
fn a_disk_has_a_name() {
    let rig = Rig::new(MIB);
    assert_eq!(rig.run(Op { kind: 8, data_bytes: 20, ..Op::default() }).data, b"root\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(rig.run(Op { kind: 8, data_bytes: 3, ..Op::default() }).data, b"roo");
}

#[test]
fn discarded_space_is_given_back_and_zeroes_read_as_zeros() {
    let rig = Rig::new(MIB);
    rig.run(Op::write(0, &vec![0xaa; MIB / 2]));
    rig.run(Op::flush());
    let before = fs::metadata(rig.path()).unwrap().blocks();
    rig.run(Op { kind: 11, out: range(0, 512, 0), ..Op::default() });
    assert!(fs::metadata(rig.path()).unwrap().blocks() < before);
    for (sector, unmap) in [(520, 1), (600, 0)] {
        rig.run(Op { kind: 13, out: range(sector, 16, unmap), ..Op::default() });
        assert_eq!(rig.run(Op::read(sector - 1, 18 * 512)).data, {
            let mut expected = vec![0xaa; 18 * 512];
            expected[512..17 * 512].fill(0);
            expected
        });
    }
}

#[test]
fn zeroes_are_written_where_the_file_system_cannot_zero_ranges() {
    // tmpfs can punch holes and not zero ranges, as NFS.
    let Ok(folder) = tempfile::tempdir_in("/dev/shm") else { return };
    let rig = Rig::in_folder(folder, MIB, |rig| rig.page_cache = true);
    rig.run(Op::write(0, &[0xaa; 8192]));
    rig.run(Op { kind: 13, out: range(1, 14, 0), ..Op::default() });
    rig.run(Op { kind: 13, out: range(100, 1 << 10, 0), ..Op::default() });
    let mut expected = [0xaa; 8192];
    expected[512..7680].fill(0);
    assert_eq!(rig.run(Op::read(0, 8192)).data, expected);
}

/// Invariant 3: what a disk read has put into guest memory is in its bitmap, and not before it is there.
#[test]
fn invariant_3_what_is_read_marks_guest_memory() {
    for misaligned in [0, 8] {
        let rig = Rig::new(MIB);
        rig.run(Op::write(0, &random(5, 3 * 4096)));
        let op = Op { misaligned, ..Op::read(0, 3 * 4096) };
        let pages = rig.data_pages(&op);
        rig.forget_marks();
        let stalled = lock(&rig.block.image.stall);
        let pending = rig.submit(op);
        std::thread::sleep(Duration::from_millis(50));
        assert!(pages.iter().all(|page| !rig.is_marked(*page)), "nothing has landed yet");
        drop(stalled);
        rig.finish(pending);
        assert!(pages.iter().all(|page| rig.is_marked(*page)), "straight: {}", misaligned == 0);
    }
}

#[test]
fn an_image_that_is_cut_off_gives_errors_and_the_rest_goes_on() {
    let rig = Rig::new(MIB);
    let file = fs::OpenOptions::new().write(true).open(rig.path()).unwrap();
    file.set_len(4096).unwrap();
    for misaligned in [0, 4] {
        assert_eq!(rig.answer(Op { misaligned, ..Op::read(8, 4096) }).status, VIRTIO_BLK_S_IOERR as u8);
        assert_eq!(rig.answer(Op { misaligned, ..Op::read(0, 8192) }).status, VIRTIO_BLK_S_IOERR as u8);
        rig.run(Op { misaligned, ..Op::read(0, 4096) });
    }
}

#[test]
fn a_flush_makes_writes_last_and_without_it_every_write_does() {
    let rig = Rig::new(MIB);
    let unsynced = |rig: &Rig| rig.block.image.unsynced();
    rig.run(Op::flush());
    assert!(!unsynced(&rig));
    rig.run(Op::write(0, &[1; 512]));
    assert!(unsynced(&rig));
    rig.run(Op::flush());
    assert!(!unsynced(&rig));
    rig.run(Op::write(0, &[1; 512]));
    rig.block.sync(soon()).unwrap();
    assert!(!unsynced(&rig));

    let through = Rig::with(MIB, |rig| rig.flush = false);
    through.run(Op::write(0, &[1; 512]));
    assert!(!unsynced(&through));
    through.run(Op { kind: 13, out: range(0, 8, 0), ..Op::default() });
    assert!(!unsynced(&through));
}

#[test]
fn a_pause_waits_for_what_is_in_flight_and_begins_nothing_new() {
    let rig = Rig::new(MIB);
    let data = random(3, 512);
    let pending: Vec<_> = (0..20).map(|at| rig.submit(Op::write(at, &data))).collect();
    rig.block.pause(soon()).unwrap();
    let [state, ..] = rig.block.queues()[..] else { panic!("no queues") };
    assert_eq!(state.next_avail, state.next_used, "all that was taken out is back");
    assert!(!rig.block.image.unsynced(), "flushed");
    rig.forget_marks();
    let more = rig.submit(Op::write(100, &data));
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(rig.block.queues()[0], state, "closed");
    assert_eq!(rig.device_marks(), 0, "nobody writes guest memory");
    rig.block.resume();
    pending.into_iter().chain([more]).for_each(|pending| drop(rig.finish(pending)));
}

#[test]
fn storage_that_does_not_answer_makes_a_pause_fail_in_time_and_the_device_stays_open() {
    let rig = Rig::new(MIB);
    let stalled = lock(&rig.block.image.stall);
    let pending = rig.submit(Op::write(0, &[9; 512]));
    rig.wait_until(|rig| rig.block.queue_positions().is_some_and(|(taken, _)| taken == 1));
    let began = Instant::now();
    let error = rig.block.pause(began + Duration::from_millis(100)).unwrap_err().to_string();
    assert!(began.elapsed() < Duration::from_secs(1));
    assert!(error.contains("disk root: 1 requests were not completed in time"), "{error}");
    drop(stalled);
    rig.finish(pending);
    rig.run(Op::write(1, &[9; 512]));

    // The same if only the flush hangs.
    let stalled = lock(&rig.block.image.stall);
    let error = rig.block.pause(Instant::now() + Duration::from_millis(100)).unwrap_err().to_string();
    assert!(error.contains("not flushed in time"), "{error}");
    drop(stalled);
    rig.run(Op::write(1, &[9; 512]));
    rig.block.pause(soon()).unwrap();
}

#[test]
fn what_one_device_leaves_in_a_queue_another_one_does() {
    let rig = Rig::new(MIB);
    let data = random(8, 4096);
    let mut pending: Vec<_> = (0..16).map(|at| rig.submit(Op::write(at * 8, &data))).collect();
    rig.block.pause(soon()).unwrap();
    pending.extend((16..20).map(|at| rig.submit(Op::write(at * 8, &data))));
    let other = rig.moved();
    other.block.resume();
    pending.into_iter().for_each(|pending| drop(other.finish(pending)));
    assert_eq!(fs::read(other.path()).unwrap()[..20 * 4096], data.repeat(20));
}

#[test]
fn a_saved_state_is_compared_with_the_disk_that_is_here() {
    let (rig, same) = (Rig::new(MIB), Rig::new(MIB));
    let state = rig.block.save().unwrap();
    same.block.load(&state).unwrap();
    let larger = Rig::new(2 * MIB).block.load(&state).unwrap_err().to_string();
    assert!(larger.contains("another disk"), "{larger}");
    let read_only = Rig::with(MIB, |rig| rig.read_only = true);
    assert!(read_only.block.load(&state).is_err());
    let coarse = codec::encode(&State { block_bytes: 4096, ..rig.block.state() }).unwrap();
    same.block.load(&coarse).unwrap();
    let mut size = [0; 4];
    same.block.read_config(20, &mut size);
    assert_eq!(u32::from_le_bytes(size), 4096, "the driver goes on with what it was told");
    for wrong in [0, 100, 1000, 1 << 40] {
        let state = codec::encode(&State { block_bytes: wrong, ..rig.block.state() }).unwrap();
        assert!(same.block.load(&state).is_err(), "{wrong}");
    }
    assert!(same.block.load(&state[1..]).is_err());
}

#[test]
fn the_configuration_space_says_what_the_disk_is() {
    let rig = Rig::new(MIB);
    let mut space = [0xff; 80];
    rig.block.read_config(0, &mut space);
    assert_eq!(space[..8], (MIB as u64 / 512).to_le_bytes());
    assert_eq!(space[12..16], 254u32.to_le_bytes());
    assert_eq!(space[34..36], 2u16.to_le_bytes());
    assert_eq!(space[60..], [0; 20], "nothing beyond");
    let mut byte = [7];
    rig.block.read_config(u64::MAX, &mut byte);
    assert_eq!(byte, [0]);
}

#[test]
fn what_is_no_image_is_not_opened() {
    let folder = tempfile::tempdir().unwrap();
    let open = |path: &std::path::Path| {
        let config = DiskConfig { id: "d".into(), path: path.into(), readonly: false };
        super::open(&config, CacheMode::Direct, 1, Company::Nobody)
            .map(drop)
            .map_err(|error| crate::error::chain(&error))
    };
    assert!(open(&folder.path().join("missing")).unwrap_err().contains("No such file"));
    assert!(open(folder.path()).is_err());
    assert!(open(std::path::Path::new("/dev/null")).is_err());
    let odd = folder.path().join("odd");
    fs::write(&odd, [0; 1000]).unwrap();
    assert!(open(&odd).unwrap_err().contains("1000 bytes"));
    fs::write(&odd, []).unwrap();
    assert!(open(&odd).is_err());
}

/// One request of a random mix: what, where in its part of the disk, and how its buffers lie in memory.
fn mixed() -> impl Strategy<Value = (u8, usize, usize, usize, Vec<usize>, bool)> {
    let cuts = prop::collection::vec(1usize..9000, 0..6);
    (0u8..6, 0usize..64, 1usize..64, 0usize..600, cuts, any::<bool>())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_mix_of_requests_does_what_a_disk_does(
        batches in prop::collection::vec(prop::collection::vec(mixed(), 1..8), 1..6),
        event_idx: bool, flush: bool, page_cache: bool, seed: u64,
    ) {
        // Each request of a batch has a part of the disk for itself, so that their order does not matter.
        const PART: usize = 64 * 512;
        let rig = Rig::with(8 * PART, |rig| {
            (rig.event_idx, rig.flush, rig.page_cache) = (event_idx, flush, page_cache);
        });
        let mut model = vec![0; 8 * PART];
        for (round, batch) in batches.iter().enumerate() {
            let mut pending = Vec::new();
            for (part, (kind, first, sectors, misaligned, cuts, unmap)) in batch.iter().enumerate() {
                let sectors = (*sectors).min(64 - first).max(1);
                let at = part * PART + first * 512;
                let bytes = at..at + sectors * 512;
                let sector = at as u64 / 512;
                let (op, expected) = match kind {
                    0 | 1 => (Op::read(sector, bytes.len()), model[bytes].to_vec()),
                    2 | 3 => {
                        let data = random(seed ^ (round * 8 + part) as u64, bytes.len());
                        model[bytes].copy_from_slice(&data);
                        (Op::write(sector, &data), Vec::new())
                    }
                    4 => (Op::flush(), Vec::new()),
                    _ => {
                        model[bytes.clone()].fill(0);
                        let out = range(sector, (bytes.len() / 512) as u32, u32::from(*unmap));
                        (Op { kind: 13, out, ..Op::default() }, Vec::new())
                    }
                };
                let op = Op { misaligned: *misaligned, cuts: cuts.clone(), queue: part % 2, indirect: *unmap, ..op };
                pending.push((rig.submit(op), expected));
            }
            for (pending, expected) in pending {
                let answer = rig.finish(pending);
                prop_assert_eq!(answer.status, 0);
                prop_assert_eq!(answer.used_bytes as usize, expected.len() + 1);
                prop_assert!(answer.data == expected, "what was read is not what was written");
            }
        }
        rig.block.pause(soon()).unwrap();
        prop_assert!(fs::read(rig.path()).unwrap() == model, "the image is not what was written");
    }

    #[test]
    fn any_bytes_as_a_request_do_no_harm(descriptors in prop::collection::vec((any::<u64>(), any::<u32>(), 0u16..8, any::<u16>()), 1..20), low: bool) {
        let rig = Rig::new(MIB);
        rig.submit_raw(&descriptors, low);
        std::thread::sleep(Duration::from_millis(2));
        rig.block.pause(soon()).unwrap();
    }
}
