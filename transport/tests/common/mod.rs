//! What the tests of all transports share.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::thread;
use std::time::{Duration, Instant};

use godwit_core::{Channel, ChannelReader, ChannelWriter, Dial};
use godwit_transport::{Listener, Options, Uri, connect, listen};
use vm_memory::VolatileSlice;

/// Long enough for a busy machine; no test waits this long when all is well.
pub const LIMIT: Duration = Duration::from_secs(20);

/// What "at once" may take on a busy machine.
pub const AT_ONCE: Duration = Duration::from_millis(500);

/// A URI to listen on, for each transport. The directory keeps a unix socket.
pub struct Places {
    directory: tempfile::TempDir,
}

impl Places {
    pub fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    pub fn all(&self) -> Vec<Uri> {
        let unix = format!("unix:{}", self.directory.path().join("listen.sock").display());
        ["tcp://127.0.0.1:0", "tcp://[::1]:0", "quic://127.0.0.1:0", "quic://[::1]:0", &unix]
            .map(|uri| uri.parse().unwrap())
            .to_vec()
    }
}

pub fn pair(uri: &Uri) -> (Listener, Box<dyn Dial>) {
    let listener = listen(uri, Options::default()).unwrap();
    let dial = connect(listener.uri(), Options::default()).unwrap();
    (listener, dial)
}

/// A listener and the two ends of a control channel: dialled, accepted.
pub fn control(uri: &Uri) -> (Listener, Channel, Channel) {
    let (listener, dial) = pair(uri);
    let dialled = dial.control(LIMIT).unwrap();
    let accepted = listener.next_control(LIMIT).unwrap().expect("a control channel");
    (listener, dialled, accepted)
}

/// The byte at `offset` of a stream that no shift or swap of blocks leaves unchanged.
pub fn pattern(offset: usize) -> u8 {
    (offset as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()[7]
}

/// Writes `length` bytes of the pattern in pieces of odd sizes, then finishes.
pub fn write_pattern(writer: &mut dyn ChannelWriter, length: usize) {
    let mut sizes = [1, 7, 4096, 65_537, 1_000_003, 3, 262_144].into_iter().cycle();
    let mut offset = 0;
    while offset < length {
        let size = sizes.next().unwrap().min(length - offset);
        let piece: Vec<u8> = (offset..offset + size).map(pattern).collect();
        writer.write_all(&piece).unwrap();
        offset += size;
    }
    writer.finish().unwrap();
}

/// Reads the pattern up to its end, by turns as plain and as volatile reads of odd sizes.
pub fn read_pattern(reader: &mut dyn ChannelReader) -> usize {
    let mut sizes = [4097, 1, 65_536, 13, 300_001].into_iter().cycle();
    let mut buffer = vec![0; 300_001];
    let mut offset = 0;
    for volatile in [false, true].into_iter().cycle() {
        let part = &mut buffer[..sizes.next().unwrap()];
        let read = if volatile {
            reader.read_volatile(&mut VolatileSlice::from(&mut *part)).unwrap()
        } else {
            reader.read(part).unwrap()
        };
        if read == 0 {
            break;
        }
        for (at, byte) in part[..read].iter().enumerate() {
            assert_eq!(*byte, pattern(offset + at), "at offset {}", offset + at);
        }
        offset += read;
    }
    offset
}

/// Runs `blocked` in a thread, lets it block, runs `end`, and expects `blocked` to return at once.
pub fn ends_at_once<T: Send + 'static>(blocked: impl FnOnce() -> T + Send + 'static, end: impl FnOnce()) -> T {
    let thread = thread::spawn(blocked);
    thread::sleep(Duration::from_millis(200));
    assert!(!thread.is_finished(), "it should block");
    let since = Instant::now();
    end();
    let result = thread.join().unwrap();
    assert!(since.elapsed() < AT_ONCE, "took {:?}", since.elapsed());
    result
}

/// Waits for a condition that other threads bring about.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        thread::sleep(Duration::from_millis(5));
    }
}
