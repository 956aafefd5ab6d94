//! The destination's data workers: one thread for each data channel, around its [`ReceivingChannel`].

use std::io;

use vm_memory::VolatileSlice;

use super::populating::Coming;
use super::receiving::{DestinationPages, Received, ReceivingChannel};
use crate::channel::ChannelReader;
use crate::chunk::HEADER_BYTES;
use crate::decoder::{DecodeError, Wants};
use crate::link::ControlLink;
use crate::message::{Applied, Message};

/// Small chunks are read together; large runs of pages past this buffer. After such a run comes the header of another, most likely: what
/// else were read with it would have to be copied.
const BUFFER_BYTES: usize = 64 << 10;

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

/// Applies all that data channel `index` carries, acknowledging marks over `link` and telling `coming` what comes next, and returns its share of the table's sum once it
/// has ended.
pub fn run(
    pages: &DestinationPages,
    link: &ControlLink,
    index: usize,
    channel: &mut ReceivingChannel,
    reader: &mut dyn ChannelReader,
    coming: Option<&Coming>,
) -> Result<u64, WorkerError> {
    let broke = |error| WorkerError::Io(index, error);
    let mut reader = Buffered { reader, buffer: vec![0; BUFFER_BYTES], filled: 0, used: 0, read_past: false };
    let mut bytes = Vec::new();
    loop {
        let received = match channel.wants() {
            Wants::Bytes(count) => {
                bytes.resize(count, 0);
                reader.read_exact(&mut bytes).map_err(broke)?;
                channel.handle_bytes(pages, &bytes)
            }
            Wants::Pages { slot, pages: count } => {
                reader.read_exact_volatile(&pages.view.pages(slot, count)).map_err(broke)?;
                channel.handle_pages(pages)
            }
            Wants::Nothing => return Err(WorkerError::Decode(index, DecodeError::Misuse)),
        };
        match received.map_err(|error| WorkerError::Decode(index, error))? {
            Received::Nothing => {}
            Received::Coming(pages) => coming.into_iter().for_each(|coming| coming.pages(pages)),
            Received::Mark(mark) => {
                let applied = Applied { channel: index as u16, mark };
                link.send(&Message::Applied(applied)).map_err(broke)?;
            }
            Received::Ended(sum) => return Ok(sum),
        }
    }
}

struct Buffered<'a> {
    reader: &'a mut dyn ChannelReader,
    buffer: Vec<u8>,
    filled: usize,
    used: usize,
    /// Whether pages were last read past the buffer.
    read_past: bool,
}

impl Buffered<'_> {
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
        let (mut done, mut past) = (0, false);
        while done < memory.len() {
            let mut rest = memory.offset(done).map_err(io::Error::other)?;
            // What has been begun past the buffer ends so: what would be read with its rest would have to be copied.
            past |= self.used == self.filled && rest.len() >= self.buffer.len();
            if past {
                self.read_past = true;
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
            let most = if std::mem::take(&mut self.read_past) { HEADER_BYTES } else { BUFFER_BYTES };
            self.filled = self.reader.read(&mut self.buffer[..most])?;
            if self.filled == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(&self.buffer[self.used..self.filled])
    }
}
