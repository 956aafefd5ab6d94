//! The check against a modelled guest: all is well after any writes, and any one thing wrong is found.

use proptest::prelude::*;

use super::check::{CheckError, CheckReport, Mismatch, MismatchKind, Place, check};
use super::config::{Contents, Order, Rate, WriteUnit, WriterConfig};
use super::header::{Header, Status};
use super::layout::{HEADER, IMAGE, PAGE_BYTES, field, status};
use super::model::{Model, Page};
use super::rules::{Jump, PAGE_WORDS, Sequence, WordRule, mix, page_key, sequence_key, word_index};

/// Frames of the model, below and above 4 GiB.
const LOW_FRAMES: u64 = 24;
const HIGH_FRAMES: u64 = 24;

/// Frames that no model's working set or fill reaches.
const UNUSED_FRAMES: u64 = 8;

#[derive(Debug, Clone)]
struct Case {
    config: WriterConfig,
    /// Which vCPU writes, one after the other.
    steps: Vec<usize>,
    vcpus: usize,
    /// How many words of each vCPU's last page are new.
    partly: Vec<usize>,
}

impl Case {
    fn run(&self) -> Model {
        let mut model = Model::boot(&self.config, self.vcpus as u64, LOW_FRAMES, HIGH_FRAMES);
        for vcpu in &self.steps {
            model.step(vcpu % self.vcpus);
        }
        for vcpu in 0..self.vcpus {
            model.step_partly(vcpu, self.partly[vcpu]);
        }
        model
    }
}

fn case() -> impl Strategy<Value = Case> {
    let pages = 1..=LOW_FRAMES + HIGH_FRAMES - UNUSED_FRAMES;
    let order = prop_oneof![Just(Order::Seq), Just(Order::Random), Just(Order::HotCold)];
    let write = prop_oneof![Just(WriteUnit::Word), Just(WriteUnit::Page)];
    let contents = prop_oneof![Just(Contents::Random), Just(Contents::Compressible)];
    let config = (pages.clone(), pages, order, write, contents, any::<u64>(), 0..5u32).prop_map(
        |(working_set, fill, order, write, contents, seed, writers)| WriterConfig {
            working_set_bytes: working_set * PAGE_BYTES,
            fill_bytes: (fill - 1) * PAGE_BYTES,
            rate: Rate::Max,
            order,
            write,
            contents,
            seed,
            writers,
        },
    );
    let steps = prop::collection::vec(0..64usize, 0..300);
    let partly = prop::collection::vec(0..=PAGE_WORDS, 4);
    (config, steps, 1..=4usize, partly).prop_map(|(config, steps, vcpus, partly)| Case { config, steps, vcpus, partly })
}

/// The one mismatch that must be found.
fn only_mismatch(model: &Model) -> Mismatch {
    match check(model) {
        Err(CheckError::Mismatch(mismatches)) => {
            assert_eq!(mismatches.pages, 1, "{mismatches}");
            mismatches.described[0].clone()
        }
        other => panic!("a damaged page was not found: {other:?}"),
    }
}

fn in_flight(model: &Model, vcpus: usize, frame: u64) -> bool {
    (0..vcpus).any(|vcpu| model.next_frame(vcpu) == Some(frame))
}

proptest! {
    #[test]
    fn whatever_was_written_checks(case in case()) {
        let model = case.run();
        let report = check(&model).unwrap();
        prop_assert_eq!(report.pages_checked, model.pages());
        prop_assert_eq!(report.pages_not_ram, 0);
        prop_assert_eq!(report.vcpus, case.vcpus);
    }

    #[test]
    fn a_page_rolled_back_is_found(case in case(), pick: prop::sample::Index) {
        let mut model = case.run();
        let mut written: Vec<(u64, Page)> = model.previous.iter().map(|(frame, page)| (*frame, *page)).collect();
        written.retain(|(frame, _)| !in_flight(&model, case.vcpus, *frame));
        prop_assume!(!written.is_empty());
        written.sort_by_key(|(frame, _)| *frame);
        let (frame, old) = written[pick.index(written.len())];
        *model.page_mut(model.frame_address(frame)) = old;
        let mismatch = only_mismatch(&model);
        prop_assert_eq!(mismatch.place, Place::Frame { frame });
        prop_assert_eq!(mismatch.kind, MismatchKind::Stale { versions: 1 });
    }

    #[test]
    fn a_flipped_bit_is_found(case in case(), frame in 0..LOW_FRAMES + HIGH_FRAMES, word in 0..PAGE_WORDS, bit in 0..64u32) {
        let mut model = case.run();
        prop_assume!(!in_flight(&model, case.vcpus, frame));
        let address = model.frame_address(frame);
        let empty = *model.page(address) == [0; PAGE_WORDS];
        model.page_mut(address)[word] ^= 1 << bit;
        let mismatch = only_mismatch(&model);
        prop_assert_eq!(mismatch.guest_address, address);
        prop_assert_eq!(mismatch.word, word);
        prop_assert_eq!(mismatch.expected ^ mismatch.found, 1 << bit);
        // Where one write is one word, a flip may happen to make another version of the page.
        match mismatch.kind {
            MismatchKind::NotZero => prop_assert!(empty),
            MismatchKind::BitFlip { bit: found } => prop_assert_eq!(found, bit),
            MismatchKind::Stale { .. } | MismatchKind::Newer { .. } | MismatchKind::Lost => {}
            other => prop_assert!(false, "{other:?}"),
        }
    }

    #[test]
    fn a_dropped_page_is_found(case in case(), frame in 0..LOW_FRAMES + HIGH_FRAMES) {
        let mut model = case.run();
        let address = model.frame_address(frame);
        let held = *model.page(address);
        prop_assume!(held != [0; PAGE_WORDS]);
        *model.page_mut(address) = [0; PAGE_WORDS];
        // A page of zeros may be what the page was before the write that is under way.
        let first_write = !model.previous.contains_key(&frame) || model.previous[&frame] == [0; PAGE_WORDS];
        prop_assume!(!(in_flight(&model, case.vcpus, frame) && first_write));
        let mismatch = only_mismatch(&model);
        prop_assert_eq!(mismatch.place, Place::Frame { frame });
        let filled = frame < case.config.fill_bytes / PAGE_BYTES;
        let stale = matches!(mismatch.kind, MismatchKind::Stale { .. });
        prop_assert!(mismatch.kind == MismatchKind::Lost || !filled && stale, "{:?}", mismatch.kind);
    }

    #[test]
    fn a_write_that_is_not_counted_is_found(case in case(), pick: prop::sample::Index, words in 1..=PAGE_WORDS) {
        let mut model = case.run();
        let working_set = case.config.working_set_bytes / PAGE_BYTES;
        let frame = pick.index(working_set as usize) as u64;
        prop_assume!(!in_flight(&model, case.vcpus, frame));
        let (old, new) = (*model.page(model.frame_address(frame)), model.written_once_more(frame));
        model.page_mut(model.frame_address(frame))[..words].copy_from_slice(&new[..words]);
        prop_assume!(*model.page(model.frame_address(frame)) != old);
        let mismatch = only_mismatch(&model);
        prop_assert_eq!(mismatch.place, Place::Frame { frame });
        if *model.page(model.frame_address(frame)) == new && old != [0; PAGE_WORDS] {
            prop_assert_eq!(mismatch.kind, MismatchKind::Newer { versions: 1 });
        }
    }

    #[test]
    fn a_write_from_back_to_front_is_found(case in case(), words in 1..PAGE_WORDS) {
        let config = WriterConfig { write: WriteUnit::Page, ..case.config };
        let mut model = Case { config, partly: vec![0; 4], ..case }.run();
        let frame = model.next_frame(0);
        prop_assume!(frame.is_some());
        let frame = frame.unwrap_or_default();
        let new = model.written_once_more(frame);
        model.page_mut(model.frame_address(frame))[words..].copy_from_slice(&new[words..]);
        prop_assert_eq!(only_mismatch(&model).place, Place::Frame { frame });
    }

    #[test]
    fn a_write_where_none_belongs_is_found(case in case(), unused in 1..=UNUSED_FRAMES, word in 0..PAGE_WORDS, value in 1..u64::MAX) {
        let mut model = case.run();
        let frame = LOW_FRAMES + HIGH_FRAMES - unused;
        model.page_mut(model.frame_address(frame))[word] = value;
        let mismatch = only_mismatch(&model);
        prop_assert_eq!((mismatch.place, mismatch.kind), (Place::Frame { frame }, MismatchKind::NotZero));
    }

    #[test]
    fn nothing_below_the_frames_may_change(case in case(), address in 0..HEADER + 0x12_000, bit in 0..8u32) {
        let mut model = case.run();
        let mut byte = [0];
        super::GuestRead::read(&model, address, &mut byte).unwrap();
        model.write(address, &[byte[0] ^ 1 << bit]);
        // Anything may be in the header's fields and on stacks, but it must not be fatal to the check.
        let outcome = check(&model);
        if !(HEADER..IMAGE).contains(&address) && !on_a_stack(&model, address, case.vcpus) {
            let found = matches!(outcome, Err(CheckError::Mismatch(_)));
            prop_assert!(found, "{address:#x}: {outcome:?}");
        }
    }

    #[test]
    fn a_jump_is_as_many_steps(seed: u64, start: u64, word in 0..PAGE_WORDS, steps in 0..200u64) {
        for contents in [Contents::Random, Contents::Compressible] {
            let rule = WordRule::new(contents.setting()).unwrap();
            let increment = rule.increment(page_key(seed, 3), word);
            let stepped = (0..steps).fold(start, |value, _| rule.step(value, increment));
            let back = (0..steps).fold(stepped, |value, _| rule.step_back(value, increment));
            prop_assert_eq!(back, start);
            prop_assert_eq!(rule.jump(start, increment, Jump::new(steps)), stepped);
        }
    }

    #[test]
    fn a_header_page_of_garbage_is_refused(bytes in prop::collection::vec(any::<u8>(), 0x200), at in 0x10..0x200u64) {
        let mut model = Model::boot(&WriterConfig { working_set_bytes: PAGE_BYTES, ..Default::default() }, 1, 24, 24);
        model.write(HEADER + at, &bytes[at as usize..]);
        let _ = check(&model);
    }
}

fn on_a_stack(model: &Model, address: u64, vcpus: usize) -> bool {
    let mut stacks = [0; 8];
    super::GuestRead::read(model, HEADER + field::STACKS, &mut stacks).unwrap();
    let Some(offset) = address.checked_sub(u64::from_le_bytes(stacks)) else { return false };
    offset / 1024 < vcpus as u64 && offset % 1024 >= 256
}

#[test]
fn writes_survive_a_long_run() {
    let config = WriterConfig { working_set_bytes: 5 * PAGE_BYTES, fill_bytes: 2 * PAGE_BYTES, ..Default::default() };
    for order in [Order::Seq, Order::Random, Order::HotCold] {
        let mut model = Model::boot(&WriterConfig { order, ..config.clone() }, 1, LOW_FRAMES, HIGH_FRAMES);
        (0..200_000).for_each(|_| model.step(0));
        let report = check(&model).unwrap();
        let expected =
            CheckReport { pages_checked: model.pages(), pages_not_ram: 0, pages_written: 5, writes: 200_000, vcpus: 1 };
        assert_eq!(report, expected);
    }
}

#[test]
fn a_stale_header_is_told_apart() {
    let mut model = Model::boot(&WriterConfig { working_set_bytes: PAGE_BYTES, ..Default::default() }, 1, 24, 24);
    let stale = *model.page(HEADER);
    (0..7).for_each(|_| model.step(0));
    *model.page_mut(HEADER) = stale;
    assert_eq!(only_mismatch(&model).kind, MismatchKind::Newer { versions: 7 });
}

#[test]
fn nine_writes_in_ten_are_hot() {
    let sequence = Sequence::new(Order::HotCold.setting(), 1, 0, 1000).unwrap();
    let hot = (0..100_000).filter(|index| sequence.page(*index) < 100).count();
    assert!((89_500..90_500).contains(&hot), "{hot}");
    assert!((0..100_000).all(|index| sequence.page(index) < 1000));
}

/// docs/workload-guest.md gives these values, for those who write their own checker.
#[test]
fn the_rules_are_as_documented() {
    assert_eq!(mix(0), 0xe220_a839_7b1d_cdaf);
    let key = page_key(1, 2);
    let random = WordRule::new(Contents::Random.setting()).unwrap();
    let compressible = WordRule::new(Contents::Compressible.setting()).unwrap();
    let three = Jump::new(3);
    let values = |rule: WordRule| {
        let (first, increment) = (rule.initial(key, 5), rule.increment(key, 5));
        (first, increment, rule.jump(first, increment, three))
    };
    assert_eq!(key, 0x0b95_f66d_327e_8d78);
    assert_eq!(word_index(key), 23);
    assert_eq!(sequence_key(1, 1), 0xb1f6_0fe4_aacf_30ee);
    assert_eq!(values(random), (0x18f0_fae5_15d2_5401, 0x39c0_b7ac_2b67_664b, 0xb619_4ac6_8bab_ecb2));
    assert_eq!(values(compressible), (0x0b95_f66d_327e_56e5, 0x8473_dd53_2fa8_7dcd, 0x0b95_f66d_327e_4794));
    let pages = |order: Order| {
        let sequence = Sequence::new(order.setting(), 1, 1, 1000).unwrap();
        (0..6).map(|index| sequence.page(index)).collect::<Vec<_>>()
    };
    assert_eq!(pages(Order::Seq), [0, 1, 2, 3, 4, 5]);
    assert_eq!(pages(Order::Random), [942, 602, 397, 961, 166, 112]);
    assert_eq!(pages(Order::HotCold), [94, 60, 39, 965, 16, 11]);
}

#[test]
fn contents_compress_as_promised() {
    let ratio = |contents, write| {
        let config = WriterConfig {
            working_set_bytes: 20 * PAGE_BYTES,
            fill_bytes: 20 * PAGE_BYTES,
            contents,
            write,
            ..Default::default()
        };
        let mut model = Model::boot(&config, 1, LOW_FRAMES, HIGH_FRAMES);
        (0..100).for_each(|_| model.step(0));
        let mut bytes = vec![0; 4096];
        let mut compressed = 0;
        for frame in 0..20 {
            super::GuestRead::read(&model, model.frame_address(frame), &mut bytes).unwrap();
            compressed += zstd::bulk::compress(&bytes, 1).unwrap().len();
        }
        20.0 * 4096.0 / compressed as f64
    };
    for write in [WriteUnit::Word, WriteUnit::Page] {
        let (random, compressible) = (ratio(Contents::Random, write), ratio(Contents::Compressible, write));
        println!("random {random:.2}, compressible {compressible:.2}");
        assert!(random < 1.01, "{random}");
        assert!((4.0..10.0).contains(&compressible), "{compressible}");
    }
}

#[test]
fn a_guest_that_does_not_run_is_not_checked() {
    let config = WriterConfig { working_set_bytes: PAGE_BYTES, ..Default::default() };
    let mut model = Model::boot(&config, 1, LOW_FRAMES, HIGH_FRAMES);
    assert_eq!(Header::new(&model).unwrap().status().unwrap(), Status::Running);
    assert_eq!(Header::new(&model).unwrap().snapshot().unwrap().config(), Some(config));
    model.write(HEADER + field::STATUS, &status::DOES_NOT_FIT.to_le_bytes());
    let error = check(&model).unwrap_err().to_string();
    assert!(error.contains("do not fit"), "{error}");
}
