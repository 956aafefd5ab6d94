//! The destination's data workers: one thread for each data channel.

use std::io;
use std::sync::Arc;

use vm_memory::VolatileSlice;

use crate::channel::ChannelReader;
use crate::decoder::{ChannelDecoder, DecodeError, Decoded, Pages, Wants};
use crate::link::ControlLink;
use crate::memory::PAGE_SIZE;
use crate::message::{Applied, Message};
use crate::table::{Page, PageHasher, PageTable};
use crate::view::MemoryView;

/// Small chunks are read together; large runs of pages past this buffer.
const BUFFER_BYTES: usize = 64 << 10;

/// What all workers of a move share.
pub struct Shared {
    /// The memory that is being filled.
    pub view: MemoryView,
    /// What was last applied.
    pub table: PageTable,
    /// Hashes pages for the table.
    pub hasher: PageHasher,
    /// Where marks are acknowledged.
    pub link: ControlLink,
    /// Number of data channels.
    pub channels: usize,
}

/// Why a data channel came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// It broke.
    #[error("data channel {0} broke: {1}")]
    Io(usize, io::Error),
    /// What it carried cannot be believed.
    #[error("data channel {0} carried what cannot be: {1}")]
    Decode(usize, DecodeError),
}

/// Applies all that data channel `index` carries, and returns its share of the table's sum once it has ended.
pub fn run(shared: &Arc<Shared>, index: usize, reader: Box<dyn ChannelReader>) -> Result<u64, WorkerError> {
    let broke = |error| WorkerError::Io(index, error);
    let mut reader = Buffered { reader, buffer: vec![0; BUFFER_BYTES], filled: 0, used: 0 };
    let mut decoder = ChannelDecoder::new(shared.view.layout(), index, shared.channels).map_err(broke)?;
    let mut bytes = Vec::new();
    let mut apply = Apply { shared, sum: 0, page: [0; PAGE_SIZE] };
    loop {
        let decoded = match decoder.wants() {
            Wants::Bytes(count) => {
                bytes.resize(count, 0);
                reader.read_exact(&mut bytes).map_err(broke)?;
                decoder.handle_bytes(&bytes)
            }
            Wants::Pages { slot, pages } => {
                reader.read_exact_volatile(&shared.view.pages(slot, pages)).map_err(broke)?;
                decoder.handle_pages()
            }
            Wants::Nothing => return Ok(apply.sum),
        };
        match decoded.map_err(|error| WorkerError::Decode(index, error))? {
            Decoded::Incomplete | Decoded::End => {}
            Decoded::Placed(pages) => apply.placed(pages),
            Decoded::Contents(pages, contents) => apply.contents(pages, contents),
            Decoded::Zero(runs) => runs.iter().for_each(|run| apply.zero(*run)),
            Decoded::Mark(mark) => {
                let applied = Applied { channel: index as u16, mark };
                shared.link.send(&Message::Applied(applied)).map_err(broke)?;
            }
        }
    }
}

struct Apply<'s> {
    shared: &'s Shared,
    sum: u64,
    page: Page,
}

impl Apply<'_> {
    /// Pages read straight into guest memory: hashed from there, so that what counts is what stands there.
    fn placed(&mut self, pages: Pages) {
        for index in 0..pages.pages {
            self.shared.view.pages(pages.slot + index, 1).copy_to(&mut self.page[..]);
            self.note(pages, index, self.shared.hasher.page(pages.frame + index as u64, &self.page));
        }
    }

    fn contents(&mut self, pages: Pages, contents: &[Page]) {
        for (index, page) in contents.iter().enumerate() {
            self.shared.view.write_page(pages.slot + index, page);
            self.note(pages, index, self.shared.hasher.page(pages.frame + index as u64, page));
        }
    }

    /// Memory is made of zeros: a page is written only if something else was applied there before, so that zeros
    /// take up no memory.
    fn zero(&mut self, pages: Pages) {
        for index in 0..pages.pages {
            let zero = self.shared.hasher.zero(pages.frame + index as u64);
            if self.shared.table.entry(pages.slot + index).is_some_and(|entry| entry != zero) {
                self.shared.view.write_page(pages.slot + index, &[0; PAGE_SIZE]);
            }
            self.note(pages, index, zero);
        }
    }

    fn note(&mut self, pages: Pages, index: usize, entry: u64) {
        self.sum = self.sum.wrapping_add(self.shared.table.set(pages.slot + index, entry));
    }
}

struct Buffered {
    reader: Box<dyn ChannelReader>,
    buffer: Vec<u8>,
    filled: usize,
    used: usize,
}

impl Buffered {
    fn read_exact(&mut self, mut bytes: &mut [u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let count = self.buffered()?.len().min(bytes.len());
            let (now, later) = bytes.split_at_mut(count);
            now.copy_from_slice(&self.buffer[self.used..][..count]);
            self.used += count;
            bytes = later;
        }
        Ok(())
    }

    fn read_exact_volatile(&mut self, memory: &VolatileSlice<'_, ()>) -> io::Result<()> {
        let mut done = 0;
        while done < memory.len() {
            let mut rest = memory.offset(done).map_err(io::Error::other)?;
            if self.used == self.filled && rest.len() >= self.buffer.len() {
                match self.reader.read_volatile(&mut rest)? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    count => done += count,
                }
            } else {
                let count = self.buffered()?.len().min(rest.len());
                rest.copy_from(&self.buffer[self.used..][..count]);
                self.used += count;
                done += count;
            }
        }
        Ok(())
    }

    /// Bytes read and not used; at least one.
    fn buffered(&mut self) -> io::Result<&[u8]> {
        if self.used == self.filled {
            self.used = 0;
            self.filled = 0;
            self.filled = self.reader.read(&mut self.buffer)?;
            if self.filled == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(&self.buffer[self.used..self.filled])
    }
}
