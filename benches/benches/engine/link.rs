//! A transport that stays in the process: bounded pipes of bytes, which cost little more than the copies.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use godwit_core::{Channel, ChannelReader, ChannelWriter, Dial, HangUp, IncomingData, SessionToken};
use vm_memory::VolatileSlice;

/// As much as a socket holds.
const CAPACITY_BYTES: usize = 1 << 20;

/// A dialling end, the control channel's far end once it has dialled, and what arrives of data channels.
pub fn link() -> (Box<dyn Dial>, Receiver<Channel>, Arriving) {
    let ((control, controls), (data, arriving)) = (mpsc::channel(), mpsc::channel());
    (Box::new(Dialling { control, data }), controls, Arriving(arriving))
}

struct Dialling {
    control: Sender<Channel>,
    data: Sender<(u16, Channel)>,
}

impl Dial for Dialling {
    fn control(&self, _: Duration) -> io::Result<Channel> {
        let (ours, theirs) = pair();
        self.control.send(theirs).map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(ours)
    }

    fn control_again(&self, _: SessionToken, _: Duration) -> io::Result<Channel> {
        Err(io::ErrorKind::ConnectionRefused.into())
    }

    fn data(&self, _: SessionToken, index: u16, _: Duration) -> io::Result<Channel> {
        let (ours, theirs) = pair();
        self.data.send((index, theirs)).map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(ours)
    }

    fn uri(&self) -> String {
        "memory:".into()
    }
}

/// Data channels on their way.
pub struct Arriving(Receiver<(u16, Channel)>);

impl IncomingData for Arriving {
    fn expect(&mut self, _: SessionToken) {}

    fn accept(&mut self, limit: Duration) -> io::Result<(u16, Channel)> {
        self.0.recv_timeout(limit).map_err(|_| io::ErrorKind::TimedOut.into())
    }

    fn expect_return(&mut self, _: SessionToken) {}

    fn accept_return(&mut self, limit: Duration) -> io::Result<Channel> {
        std::thread::sleep(limit);
        Err(io::ErrorKind::TimedOut.into())
    }
}

fn pair() -> (Channel, Channel) {
    let (there, back) = (Arc::new(Pipe::default()), Arc::new(Pipe::default()));
    let end = |read: &Arc<Pipe>, write: &Arc<Pipe>| Channel {
        reader: Box::new(Reader(Arc::clone(read))),
        writer: Box::new(Writer { pipe: Arc::clone(write), written_bytes: 0 }),
        hang_up: Arc::new(Both([Arc::clone(read), Arc::clone(write)])),
        peer: "memory:".into(),
    };
    (end(&back, &there), end(&there, &back))
}

#[derive(Default)]
struct Pipe {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Default)]
struct Inner {
    bytes: VecDeque<u8>,
    ended: bool,
    broken: bool,
}

impl Pipe {
    /// Hands what there is to `take`, which says how much of it is used up.
    fn read(&self, take: impl FnOnce(&[u8]) -> usize) -> io::Result<usize> {
        let waits = |inner: &mut Inner| inner.bytes.is_empty() && !inner.ended && !inner.broken;
        let mut inner = self.changed.wait_while(self.inner.lock().unwrap(), waits).unwrap();
        if inner.broken {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let count = take(inner.bytes.as_slices().0);
        inner.bytes.drain(..count);
        self.changed.notify_one();
        Ok(count)
    }

    fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let full = |inner: &mut Inner| inner.bytes.len() >= CAPACITY_BYTES && !inner.broken;
            let mut inner = self.changed.wait_while(self.inner.lock().unwrap(), full).unwrap();
            if inner.broken {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let (now, later) = bytes.split_at(bytes.len().min(CAPACITY_BYTES - inner.bytes.len()));
            inner.bytes.extend(now);
            bytes = later;
            self.changed.notify_one();
        }
        Ok(())
    }

    fn change(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.inner.lock().unwrap());
        self.changed.notify_all();
    }
}

struct Reader(Arc<Pipe>);

impl ChannelReader for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(|bytes| {
            let count = bytes.len().min(buffer.len());
            buffer[..count].copy_from_slice(&bytes[..count]);
            count
        })
    }

    fn read_volatile(&mut self, buffer: &mut VolatileSlice<'_, ()>) -> io::Result<usize> {
        self.0.read(|bytes| {
            let count = bytes.len().min(buffer.len());
            buffer.copy_from(&bytes[..count]);
            count
        })
    }
}

struct Writer {
    pipe: Arc<Pipe>,
    written_bytes: u64,
}

impl ChannelWriter for Writer {
    fn write_all(&mut self, buffer: &[u8]) -> io::Result<()> {
        self.written_bytes += buffer.len() as u64;
        self.pipe.write(buffer)
    }

    fn bytes_on_wire(&self) -> u64 {
        self.written_bytes
    }

    fn finish(&mut self) -> io::Result<()> {
        self.pipe.change(|inner| inner.ended = true);
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.pipe.change(|inner| inner.ended = true);
    }
}

struct Both([Arc<Pipe>; 2]);

impl HangUp for Both {
    fn hang_up(&self) {
        self.0.iter().for_each(|pipe| pipe.change(|inner| inner.broken = true));
    }
}
