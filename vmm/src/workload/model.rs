//! A workload guest on modelled memory: the guest's own write code, without a machine.

use std::collections::HashMap;
use std::io;

use super::access::{GuestRange, GuestRead};
use super::config::{WriteUnit, WriterConfig};
use super::header::vcpu_line;
use super::image::elf;
use super::layout::{
    HEADER, LARGE_PAGE_FLAGS, PAGE_BYTES, STACK_BYTES, STACK_UNUSED_BYTES, STATIC_GIB, TABLE_FLAGS, TRAMPOLINE, field,
    line, status,
};
use super::rules::{PAGE_WORDS, Sequence, WordRule, page_key, share, writers};
use super::writer;

/// Where the header page lies in the ELF file.
const HEADER_OFFSET: usize = 0x1000;

/// RAM above 4 GiB begins here.
pub(super) const HIGH: u64 = 4 << 30;

pub(super) type Page = [u64; PAGE_WORDS];

/// RAM in two ranges, one of them above 4 GiB.
pub(super) struct Model {
    ram: Vec<(GuestRange, Vec<u64>)>,
    pub(super) config: WriterConfig,
    rule: WordRule,
    vcpus: Vec<Vcpu>,
    /// Frames in the lower range.
    low_frames: u64,
    /// What a frame held before it was last written.
    pub(super) previous: HashMap<u64, Page>,
}

struct Vcpu {
    first_frame: u64,
    sequence: Sequence,
    pages: u64,
    writes: u64,
}

impl Model {
    /// A guest that has booted and filled, with `low_frames` below and `high_frames` above 4 GiB.
    pub(super) fn boot(config: &WriterConfig, vcpus: u64, low_frames: u64, high_frames: u64) -> Self {
        let elf = elf(config);
        let header = |offset: u64| {
            let start = HEADER_OFFSET + offset as usize;
            u64::from_le_bytes(elf[start..start + 8].try_into().unwrap())
        };
        let (stacks, image_end) = (header(field::STACKS), header(field::IMAGE_END));
        let frames_start = image_end + PAGE_BYTES; // One more page table.
        let low_bytes = frames_start + low_frames * PAGE_BYTES;
        let range =
            |guest_address, size_bytes| (GuestRange { guest_address, size_bytes }, vec![0u64; size_bytes as usize / 8]);
        let working_set = config.working_set_bytes / PAGE_BYTES;
        let vcpu = |vcpu| {
            let (first_frame, pages) = share(working_set, vcpu, writers(config.writers, vcpus));
            let sequence = Sequence::new(config.order.setting(), config.seed, vcpu, pages).unwrap();
            Vcpu { first_frame, sequence, pages, writes: 0 }
        };
        let mut model = Self {
            ram: vec![range(0, low_bytes), range(HIGH, high_frames * PAGE_BYTES)],
            config: config.clone(),
            rule: WordRule::new(config.contents.setting()).unwrap(),
            vcpus: (0..vcpus).map(vcpu).collect(),
            low_frames,
            previous: HashMap::new(),
        };
        let loaded = HEADER_OFFSET..HEADER_OFFSET + (stacks - HEADER) as usize;
        model.write(HEADER, &elf[loaded]);
        let trampoline = header(field::TRAMPOLINE_SOURCE);
        for byte in 0..header(field::TRAMPOLINE_BYTES) {
            let mut copy = [0];
            model.read(trampoline + byte, &mut copy).unwrap();
            model.write(TRAMPOLINE + byte, &copy);
        }
        model.add_table(header(field::TABLES), image_end);
        model.publish(frames_start, low_frames, high_frames);
        model.scribble(stacks, vcpus);
        for frame in 0..config.fill_bytes / PAGE_BYTES {
            let (rule, key) = (model.rule, page_key(config.seed, frame));
            // SAFETY: a whole page of modelled memory.
            unsafe { writer::fill(model.page_mut(model.frame_address(frame)).as_mut_ptr(), rule, key) };
        }
        model
    }

    fn add_table(&mut self, tables: u64, table: u64) {
        self.put(tables + PAGE_BYTES + STATIC_GIB * 8, table + TABLE_FLAGS);
        for entry in 0..512 {
            self.put(table + entry * 8, HIGH + (entry << 21) + LARGE_PAGE_FLAGS);
        }
    }

    /// The facts that the guest finds out when it boots.
    fn publish(&mut self, frames_start: u64, low_frames: u64, high_frames: u64) {
        let vcpus = self.vcpus.len() as u64;
        self.put(HEADER + field::VCPUS, vcpus | 2 << 32); // The number of ranges shares the word.
        self.put(HEADER + field::FRAMES, low_frames + high_frames);
        self.put(HEADER + field::MAPPED_GIB, STATIC_GIB + 1);
        for (index, value) in [frames_start, low_frames, HIGH, high_frames].into_iter().enumerate() {
            self.put(HEADER + field::RANGES + index as u64 * 8, value);
        }
        self.write(HEADER + field::STATUS, &status::RUNNING.to_le_bytes());
    }

    /// Something where anything is allowed: stacks, heartbeats, KVM's clocks.
    fn scribble(&mut self, stacks: u64, vcpus: u64) {
        for vcpu in 0..vcpus {
            for offset in (STACK_UNUSED_BYTES..STACK_BYTES).step_by(8) {
                self.put(stacks + vcpu * STACK_BYTES + offset, offset ^ 0x5555);
            }
            let line = HEADER + vcpu_line(vcpu as usize);
            for offset in [line::HEARTBEAT, line::PVCLOCK, line::PVCLOCK + 8, line::PVCLOCK + 24] {
                self.put(line + offset, u64::MAX / (vcpu + 3));
            }
        }
    }

    /// Lets one vCPU write its next page.
    pub(super) fn step(&mut self, vcpu: usize) {
        let Some(frame) = self.next_frame(vcpu) else { return };
        let address = self.frame_address(frame);
        self.previous.insert(frame, *self.page(address));
        *self.page_mut(address) = self.written_once_more(frame);
        self.vcpus[vcpu].writes += 1;
        self.put(HEADER + vcpu_line(vcpu) + line::WRITES, self.vcpus[vcpu].writes);
    }

    /// Stops one vCPU in the middle of its next write: `words` words are new, and the count is not advanced.
    pub(super) fn step_partly(&mut self, vcpu: usize, words: usize) {
        let Some(frame) = self.next_frame(vcpu) else { return };
        let (address, new) = (self.frame_address(frame), self.written_once_more(frame));
        self.page_mut(address)[..words].copy_from_slice(&new[..words]);
    }

    /// What a frame holds after one more write.
    pub(super) fn written_once_more(&self, frame: u64) -> Page {
        let mut page = *self.page(self.frame_address(frame));
        let key = page_key(self.config.seed, frame);
        let write = match self.config.write {
            WriteUnit::Word => writer::write_word,
            WriteUnit::Page => writer::write_page,
        };
        // SAFETY: a whole page.
        unsafe { write(page.as_mut_ptr(), self.rule, key) };
        page
    }

    /// The frame that a vCPU writes next.
    pub(super) fn next_frame(&self, vcpu: usize) -> Option<u64> {
        let Vcpu { first_frame, sequence, pages, writes } = &self.vcpus[vcpu];
        (*pages > 0).then(|| first_frame + sequence.page(*writes))
    }

    /// Where a frame lies.
    pub(super) fn frame_address(&self, frame: u64) -> u64 {
        match frame.checked_sub(self.low_frames) {
            None => self.ram[0].0.size_bytes - (self.low_frames - frame) * PAGE_BYTES,
            Some(high) => HIGH + high * PAGE_BYTES,
        }
    }

    pub(super) fn page(&self, address: u64) -> &Page {
        let (range, start) = self.locate(address);
        self.ram[range].1[start..start + PAGE_WORDS].try_into().unwrap()
    }

    pub(super) fn page_mut(&mut self, address: u64) -> &mut Page {
        let (range, start) = self.locate(address);
        (&mut self.ram[range].1[start..start + PAGE_WORDS]).try_into().unwrap()
    }

    /// All pages of RAM.
    pub(super) fn pages(&self) -> u64 {
        self.ram.iter().map(|(range, _)| range.size_bytes / PAGE_BYTES).sum()
    }

    pub(super) fn put(&mut self, address: u64, value: u64) {
        let (range, word) = self.locate(address);
        self.ram[range].1[word] = value;
    }

    fn locate(&self, address: u64) -> (usize, usize) {
        let range = usize::from(address >= HIGH);
        (range, ((address - self.ram[range].0.guest_address) / 8) as usize)
    }

    /// Overwrites bytes.
    pub(super) fn write(&mut self, address: u64, bytes: &[u8]) {
        for (offset, byte) in bytes.iter().enumerate() {
            let address = address + offset as u64;
            let (range, word) = self.locate(address);
            let shift = address % 8 * 8;
            let cell = &mut self.ram[range].1[word];
            *cell = *cell & !(0xff << shift) | u64::from(*byte) << shift;
        }
    }
}

impl GuestRead for Model {
    fn ranges(&self) -> Vec<GuestRange> {
        self.ram.iter().map(|(range, _)| *range).collect()
    }

    fn read(&self, address: u64, buffer: &mut [u8]) -> io::Result<()> {
        for (offset, byte) in buffer.iter_mut().enumerate() {
            let address = address + offset as u64;
            let (range, word) = self.locate(address);
            let cell = self.ram[range].1.get(word).ok_or(io::ErrorKind::UnexpectedEof)?;
            *byte = (cell >> (address % 8 * 8)) as u8;
        }
        Ok(())
    }
}
